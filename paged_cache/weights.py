"""Tells when K and V computed earlier are no longer what the model would compute now."""

import weakref
from collections.abc import Hashable
from itertools import chain
from typing import Any

import torch

from .compat import peft_tuner_layers

_SAMPLES = 64
"""Elements looked at per base weight under an adapter: merging and unmerging changes almost all of them."""


class WeightsVersion:
    """Names the state of a model's weights and adapters, so that it can be part of a prefix key.

    In-place changes (optimizer steps, `load_state_dict`) show in torch's version counters, replaced parameters and modules in
    their identity, adapters in their names, scaling and content (peft swaps some through `.data`, which no counter sees).
    Other changes do not show (writes through `.data`, attributes of modules, hooks that change activations): call
    `invalidate`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._seen: list[tuple[weakref.ref[Any], int]] = []
        self._tree: tuple[int, ...] = ()
        self._tuners: list[torch.nn.Module] = []
        self._generation = 0

    def invalidate(self) -> None:
        """From now on the weights count as other ones."""
        self._generation += 1
        self._seen = []

    def key(self) -> Hashable | None:
        """Equal keys mean equal weights; None if the state cannot be told, so that nothing may be shared."""
        model = self._model()
        modules = list(model.modules()) if model is not None else []
        if model is None or any(module.training for module in modules):
            return None
        tensors = list(chain(model.parameters(), model.buffers()))
        if any(tensor.is_inference() for tensor in tensors):  # no version counter
            return None
        parts: list[tuple[Any, int]] = [(module, 0) for module in modules]
        parts += [(tensor, tensor.data_ptr()) for tensor in tensors]
        if not self._are_seen(parts):
            self._generation += 1
            self._seen = [(weakref.ref(part), pointer) for part, pointer in parts]
        self._look(model)
        adapters = _adapters_key(self._tuners)
        # counters only grow and the tensors are the same ones, so that the sum tells any change in place
        return None if adapters is None else (self._generation, sum(tensor._version for tensor in tensors), adapters)

    def light_key(self) -> Hashable:
        """What may change and change back between two tokens: train or eval mode, the modules, and which adapters are active."""
        model = self._model()
        if model is None:
            return None
        self._look(model)
        adapters = tuple((bool(layer._forward_pre_hooks), _layer_key(layer)) for layer in self._tuners)
        return model.training, self._tree, adapters

    def _look(self, model: torch.nn.Module) -> None:
        """Adapters come and go with modules."""
        tree = _tree(model)
        if tree != self._tree:
            self._tree, self._tuners = tree, peft_tuner_layers(model)

    def _are_seen(self, parts: list[tuple[Any, int]]) -> bool:
        return len(parts) == len(self._seen) and all(
            ref() is part and known == pointer for (ref, known), (part, pointer) in zip(self._seen, parts, strict=True)
        )


def _tree(model: torch.nn.Module) -> tuple[int, ...]:
    """Which modules a model has, and where; quicker than `modules()`, since it is asked for every token.

    Ids are enough: a module that comes back was there all the time, so that nobody else had its id meanwhile.
    """
    found: list[torch.nn.Module | None] = [model]
    parents = set()
    for module in found:
        if module is not None and module._modules and id(module) not in parents:
            parents.add(id(module))
            found += module._modules.values()
    return tuple(map(id, found))


def _adapters_key(layers: list[torch.nn.Module]) -> Hashable | None:
    """State and content of peft adapters; None while a batch mixes adapters, where rows differ in their weights."""
    if any(layer._forward_pre_hooks for layer in layers):
        return None
    return tuple(_layer_key(layer) for layer in layers), _checksum(layers)


def _layer_key(layer: torch.nn.Module) -> Hashable:
    scaling = getattr(layer, "scaling", {})
    active = tuple(getattr(layer, "active_adapters", ()))
    return (
        active,
        bool(getattr(layer, "disable_adapters", False)),
        tuple(getattr(layer, "merged_adapters", ())),
        tuple(float(scaling[name]) if name in scaling else None for name in active),
    )


def _checksum(layers: list[torch.nn.Module]) -> tuple[int, ...]:
    """All bits of adapter weights, a sample of the bits of the base weights under them."""
    sums = []
    for layer in layers:
        for name, tensor in layer.named_parameters():
            flat = tensor.detach().reshape(-1)
            if name.startswith("base_layer."):
                flat = flat[:: max(flat.numel() // _SAMPLES, 1)]
            sums.append(_bits(flat))
    return tuple(torch.stack([s.cpu() for s in sums]).tolist()) if sums else ()


def _bits(flat: torch.Tensor) -> torch.Tensor:
    """A sum over the elements' bits, each with a weight of its own, modulo 2**64."""
    bits = flat.contiguous().view(torch.uint8).to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.numel(), 2, device=bits.device)).sum()
