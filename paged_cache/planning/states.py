"""What a cache keeps besides K and V: a forward on the meta device tells, since every architecture has its own states."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ..compat import text_config

_KEYS_AND_VALUES = ("keys", "values")


@dataclass(frozen=True)
class States:
    """Memory of one sequence that is in no block.

    Attributes:
        nbytes: Of a fixed size: states of linear attention and convolutions.
        bytes_per_token: That grows: keys of an indexer.
    """

    nbytes: int = 0
    bytes_per_token: int = 0


def states_of(model: torch.nn.Module, config: Any) -> States | None:
    """The states of one sequence; None where the model's code cannot run without values."""
    try:
        first, second = (_other_bytes(model, config, num_tokens) for num_tokens in (2, 3))
    except Exception:  # noqa: BLE001 - the code of any model: there is no telling what it raises on tensors without values
        return None
    return States(first - 2 * (second - first), second - first)


@torch.no_grad()
def _other_bytes(model: torch.nn.Module, config: Any, num_tokens: int) -> int:
    """Bytes besides K and V that a cache holds after so many tokens."""
    cache = DynamicCache(config=text_config(config))
    model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    tensors = [tensor for layer in cache.layers for name, value in vars(layer).items() if name not in _KEYS_AND_VALUES
               for tensor in _tensors(value)]  # fmt: skip
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor.ndim)  # numbers are bookkeeping


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
