"""Tells when K and V computed earlier are no longer what the model would compute now."""

import itertools
import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

from .adapters import BASE
from .adapters import tuners as peft_layers
from .adapters.exclusive import lock_of
from .adapters.glance import Glance
from .bits import samples, sums
from .compat import offloaded_weights, peft_layer_classes
from .prepacking import forget_copies


class WeightsVersion:
    """Names the state of a model's weights and adapters, so that it can be part of a prefix key.

    In-place changes of the model's own weights (optimizer steps, `load_state_dict`) show in torch's version counters, replaced
    parameters and modules in their identity. Adapters count by their content (peft swaps some through `.data`, which no counter
    sees), so that one that comes back, or is loaded again, is the same one, and others do not matter.
    Other changes do not show (writes through `.data`, attributes of modules, hooks that change activations): call
    `invalidate`.

    Attributes:
        lock: Held by who computes with the model, looks at its adapters, or loads some: others are not to see which are active
            meanwhile.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self.lock = weakref.ref(model), lock_of(model)
        self._seen: list[tuple[weakref.ref[Any], int]] = []
        self._sampled: tuple[int, Hashable] = (-1, None)
        self._generation = 0
        self._modules: _Modules | None = None
        self._counting = threading.Lock()

    def invalidate(self) -> None:
        """From now on the weights count as other ones."""
        with self._counting:
            self._generation += 1
            self._seen = []
        model = self._model()
        if model is not None:
            forget_copies(model)

    def read(self) -> "Weights | None":
        """The weights as they are now; None if that cannot be told, so that nothing may be shared."""
        model = self._model()
        if model is None or any(module.training for module in _everything(model) if module is not None):
            return None
        modules, tuners = peft_layers.split(model)
        parts = [part for module in modules for part in _parts(module)]
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if any(tensor.is_inference() for tensor in tensors) or peft_layers.is_mixing(tuners):
            return None  # there is no version counter, or rows of one batch differ in their weights
        # counters only grow and the tensors are the same ones, so that the sum tells any change in place
        version = sum(tensor._version for tensor in tensors)
        with self._counting:  # two threads that look for the first time see one generation
            self._count(parts, tensors, version)
            return Weights((self._generation, version), tuners)

    def key(self, adapter_name: str | None = None) -> Hashable | None:
        """Equal keys mean equal weights for rows with this adapter; None if nothing may be shared. See `effective`."""
        weights = self.read()
        return None if weights is None else weights.key(adapter_name)

    @property
    def model(self) -> torch.nn.Module | None:
        """Whose weights these are; None once it is garbage."""
        return self._model()

    def light_key(self) -> Hashable:
        """What may change and change back between two tokens: train or eval mode, the modules, and which adapters are active."""
        model = self._model()
        if model is None:
            return None
        seen = self._modules
        modules = seen if seen is not None and seen.are_same() else self._look_again(model, seen)
        return model.training, modules.number, modules.adapters, tuple(map(peft_layers.light_key, modules.tuners))

    @property
    def tuners(self) -> list[Any]:
        """peft's layers in the model when `light_key` was asked last; another list if any module or adapter came or went."""
        return [] if self._modules is None else self._modules.tuners

    def glance(self, adapter_name: str | None) -> Hashable:
        """What `light_key` does not see: whether an adapter's weights are what they were. Quick, and not for good; see `Glance`."""
        return None if self._modules is None else self._modules.glance.at(adapter_name)

    def _look_again(self, model: torch.nn.Module, seen: "_Modules | None") -> "_Modules":
        with self._counting:
            if self._modules is None or self._modules is seen:  # no other thread was first
                self._modules = _Modules(model)
            return self._modules

    def _count(self, parts: list[Any], tensors: list[torch.Tensor], version: int) -> None:
        """A new generation if the parts are other ones, or if peft wrote to them past the counters, as merging does."""
        places = [(part, part.data_ptr() if isinstance(part, torch.Tensor) else 0) for part in parts]
        is_same = len(places) == len(self._seen) and all(
            ref() is part and known == pointer for (ref, known), (part, pointer) in zip(self._seen, places, strict=True)
        )
        sampled = version, samples(tensors) if peft_layer_classes() else None
        if is_same and sampled == self._sampled:
            return
        if not is_same or (sampled[0] == self._sampled[0] and sampled[1] != self._sampled[1]):
            self._generation += 1
        self._sampled = sampled
        self._seen = [(weakref.ref(part), pointer) for part, pointer in places]


class Weights:
    """The weights of a model at one moment; good until anything changes."""

    def __init__(self, base: Hashable, tuners: dict[Any, int]) -> None:
        self._base, self._tuners = base, tuners
        self._keys: dict[str | None, Hashable] = {}

    def key(self, adapter_name: str | None = None) -> Hashable:
        """Names them as far as rows with this adapter depend on them; None stands for the active adapters."""
        if adapter_name not in self._keys:
            self._keys[adapter_name] = self._base, self._adapters(adapter_name)
        return self._keys[adapter_name]

    def _adapters(self, adapter_name: str | None) -> Hashable:
        """By layer what the adapters that count are, whatever they are called: numbers, and sums over the bits of their tensors.

        () for the base model.
        """
        layers: list[Hashable] = []
        tensors: list[torch.Tensor] = []
        is_known = adapter_name is None or adapter_name == BASE
        for tuner, place in self._tuners.items():
            names = peft_layers.effective(tuner, adapter_name)
            is_known = is_known or bool(names)
            if names or tuner.merged_adapters:
                parts = [part for name in names for part in peft_layers.content(tuner, name)]
                tensors += [value for _, value in parts if isinstance(value, torch.Tensor)]
                layers.append((place, len(names), tuple(tuner.merged_adapters), tuple(map(_describe, parts))))
        if not is_known or any(tensor.is_meta for tensor in tensors):
            return object()  # not in the model, or offloaded, so that changes cannot be seen: nothing is shared
        return (tuple(layers), sums(tensors)) if layers else ()


def _describe(part: tuple[str, Any]) -> Hashable:
    attribute, value = part
    return (attribute, value.shape, value.dtype) if isinstance(value, torch.Tensor) else (attribute, repr(value))


def _parts(module: torch.nn.Module) -> Iterator[Any]:
    """The module and its own tensors, or what stands for those that accelerate takes away between forwards."""
    yield module
    offloaded = offloaded_weights(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if tensor.is_meta and offloaded is not None:
            yield _kept(offloaded, name)
        else:
            yield tensor


def _kept(offloaded: Mapping[str, Any], name: str) -> Any:
    """An offloaded tensor itself if it is in memory, else the object that reads it from disk."""
    prefix, kept = getattr(offloaded, "prefix", ""), getattr(offloaded, "dataset", offloaded)
    in_memory = kept if isinstance(kept, dict) else getattr(kept, "state_dict", {})
    return in_memory.get(f"{prefix}{name}", kept if not isinstance(kept, dict) else offloaded)


def _everything(model: torch.nn.Module) -> list[torch.nn.Module | None]:
    """All modules in all places."""
    found: list[torch.nn.Module | None] = [model]
    parents = set()
    for module in found:
        if module is not None and module._modules and id(module) not in parents:
            parents.add(id(module))
            found += module._modules.values()
    return found


class _Modules:
    """The modules and adapters of a model as they were when this was made. Keeps no module alive but peft's layers.

    Attributes:
        number: Another one each time.
        tuners: Those modules that are peft's layers.
        adapters: Which adapters these have.
        glance: See `Glance`.
    """

    _numbers = itertools.count()

    def __init__(self, model: torch.nn.Module) -> None:
        self.number = next(self._numbers)
        self.tuners = list(peft_layers.split(model)[1])
        self.glance = Glance(self.tuners)
        self._parents = [weakref.ref(module) for module in _everything(model) if module is not None]
        self._keyed = [keyed for tuner in self.tuners for keyed in peft_layers.parameters_by_name(tuner)]
        self._seen, self.adapters = self._look(), self._names()

    def are_same(self) -> bool:
        """Whether none came or went since; quick, since it is asked for every token."""
        return self._look() == self._seen and self._names() == self.adapters

    def _look(self) -> list[Any]:
        """All children of all modules, in order. References tell a module from another one that got its memory."""
        ref = weakref.ref
        modules = [module for parent in self._parents if (module := parent()) is not None]
        return [None if child is None else ref(child) for module in modules for child in module._modules.values()]

    def _names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(tuple, self._keyed))
