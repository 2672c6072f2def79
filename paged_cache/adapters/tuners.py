"""The layers that peft puts around those of a model, and which of their adapters count."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch

from ..compat import peft_layer_classes
from . import BASE

_OF_MIXING = {"adapter_names", "alora_offsets"}
"""What peft's hooks tell its layers about the rows of a batch."""


def split(model: torch.nn.Module) -> tuple[list[torch.nn.Module], dict[Any, int]]:
    """The model's own modules, and peft's layers around some of them; what belongs to one adapter is in neither.

    Returns:
        The modules in an order that does not depend on peft, and each of peft's layers with the number of modules before it.
    """
    kinds = peft_layer_classes()
    modules: list[torch.nn.Module] = []
    tuners: dict[Any, int] = {}
    seen: set[int] = set()
    waiting: list[torch.nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        children = list(module._modules.values())
        if kinds and isinstance(module, kinds):
            tuners[module] = len(modules)
            children = [child for child in children if not _is_keyed(child)]
        else:
            modules.append(module)
        waiting += reversed(children)
    return modules, tuners


def names_in(tuner: Any) -> set[str]:
    """The adapters that a layer holds."""
    return {name for _, container in _containers(tuner, tuner.adapter_layer_names) for name in container.keys()}  # noqa: SIM118


def parameters_by_name(tuner: Any) -> list[Any]:
    """What a layer keeps by the names of adapters that are parameters, not modules: they come and go without a module."""
    containers = (container for _, container in _containers(tuner, tuner.adapter_layer_names))
    return [container for container in containers if not isinstance(container, torch.nn.ModuleDict)]


def effective(tuner: Any, adapter_name: str | None) -> tuple[str, ...]:
    """The adapters of a layer that count for a row, in the order in which they are applied.

    Args:
        tuner: One of peft's layers.
        adapter_name: The row's adapter; None for those that are active.
    """
    if adapter_name == BASE or (adapter_name is None and tuner.disable_adapters):
        return ()
    held = names_in(tuner)
    wanted = tuner.active_adapters if adapter_name is None else (adapter_name,)
    return tuple(name for name in wanted if name in held)


def content(tuner: Any, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """All that one adapter is in a layer: tensors, and numbers such as its scaling, by the names of their attributes."""
    for attribute, container in _containers(tuner, (*tuner.adapter_layer_names, *tuner.other_param_names)):
        if adapter_name not in container:
            continue
        item = container[adapter_name]
        if isinstance(item, torch.nn.Module):
            for i, module in enumerate(item.modules() if item._modules else (item,)):
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        yield f"{attribute}.{i}.{name}", tensor
        elif isinstance(item, torch.Tensor) or item is None or isinstance(item, (int, float, str, list, tuple)):
            yield attribute, item
    variant = vars(tuner).get("lora_variant", {}).get(adapter_name)
    yield "variant", None if variant is None else type(variant).__qualname__


def parts_of(tuner: Any, adapter_name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a layer has the tensors of an adapter: in which dictionary, under which key."""
    for _, container in _containers(tuner, tuner.adapter_layer_names):
        if adapter_name not in container:
            continue
        if isinstance(container, torch.nn.ModuleDict):
            for module in container[adapter_name].modules():
                yield from ((module._parameters, key) for key in module._parameters)
        elif isinstance(container, torch.nn.Module):
            yield (container._parameters if adapter_name in container._parameters else container._buffers), adapter_name


def is_invoked(tuner: Any, adapter_name: str) -> bool:
    """Whether tokens of the prompt switch an adapter on (aLoRA); without being told where, peft computes the base model."""
    variant = vars(tuner).get("lora_variant", {}).get(adapter_name)
    return type(variant).__name__.startswith("ALora")


def merged(tuners: Iterable[Any]) -> tuple[str, ...]:
    """The adapters that are merged into the base weights somewhere."""
    return tuple(sorted({name for tuner in tuners for name in tuner.merged_adapters}))


def is_mixing(tuners: Iterable[Any]) -> bool:
    """Whether peft itself mixes adapters in the batch that runs now."""
    hooks = (hook for tuner in tuners for hook in tuner._forward_pre_hooks.values())
    return any(not _OF_MIXING.isdisjoint(getattr(hook, "keywords", ())) for hook in hooks)


def light_key(tuner: Any) -> Hashable:
    """What of a layer may change and change back between two tokens."""
    scaling = vars(tuner).get("scaling", {})
    active = tuple(tuner.active_adapters)
    return (
        active,
        bool(tuner.disable_adapters),
        tuple(tuner.merged_adapters),
        bool(tuner._forward_pre_hooks),
        tuple(float(scaling[name]) if name in scaling else None for name in active),
    )


def _containers(tuner: Any, attributes: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a layer keeps by the names of adapters; some attributes are those of a module inside it, with a dot."""
    for attribute in attributes:
        container = tuner
        for name in attribute.split("."):
            container = getattr(container, name, None)
        if _is_keyed(container):
            yield attribute, container


def _is_keyed(container: Any) -> bool:
    return hasattr(container, "keys") and hasattr(container, "__getitem__")
