"""What a cache really holds: a forward on the meta device tells, since every architecture has its own states."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..compat import DummyLayer
from ..memory.layout import LayerSpec
from ..model_spec import ModelSpec, cache_layers

_KEYS_AND_VALUES = ("keys", "values")
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass(frozen=True)
class States:
    """Memory of one sequence that is in no block.

    Attributes:
        nbytes: Of a fixed size: states of linear attention and convolutions.
        bytes_per_token: That grows: keys of an indexer.
    """

    nbytes: int = 0
    bytes_per_token: int = 0


@dataclass(frozen=True)
class Probe:
    """What a forward left in transformers' own cache.

    Attributes:
        states: Besides K and V.
        layers: Layers whose K and V have another shape than the config tells, as they are.
    """

    states: States
    layers: dict[int, LayerSpec]


def has_states(spec: ModelSpec) -> bool:
    """Whether layers may keep more than K and V."""
    return any(type(layer) not in _PLAIN for layer in cache_layers(spec.config))


def probe(model: torch.nn.Module, spec: ModelSpec) -> Probe | None:
    """What the model's code puts into a cache; None where it cannot run on tensors without values."""
    try:
        first, second = (_fill(model, spec, num_tokens) for num_tokens in (2, 3))
    except Exception:  # noqa: BLE001 - the code of any model: there is no telling what it raises on tensors without values
        return None
    small, large = _other_bytes(first), _other_bytes(second)
    return Probe(States(small - 2 * (large - small), large - small), _differing(first, spec))


@torch.no_grad()
def _fill(model: torch.nn.Module, spec: ModelSpec, num_tokens: int) -> DynamicCache:
    cache = DynamicCache(config=spec.config)
    model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    return cache


def _other_bytes(cache: DynamicCache) -> int:
    held = (value for layer in cache.layers for name, value in vars(layer).items() if name not in _KEYS_AND_VALUES)
    tensors = [tensor for value in held for tensor in _tensors(value)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor.ndim)  # numbers are bookkeeping


def _differing(cache: DynamicCache, spec: ModelSpec) -> dict[int, LayerSpec]:
    found = {}
    for index, layer in enumerate(cache.layers):
        keys, values, told = getattr(layer, "keys", None), getattr(layer, "values", None), spec.layers.get(index)
        if told is not None and keys is not None and values is not None and keys.ndim == values.ndim == 4:
            real = replace(told, key_heads=keys.shape[1], key_dim=keys.shape[3],
                           value_heads=values.shape[1], value_dim=values.shape[3])  # fmt: skip
            if real != told:
                found[index] = real
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
