"""Where the parts of a model compute: on the device of their weights, or where accelerate's hooks take them."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from .compat import execution_device


def layer_devices(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, torch.device]:
    """Per cache layer where its K and V are computed.

    Args:
        model: Its attention modules say by `layer_idx` which layer they are, or lie in a list; other layers are where the
            first of these is, or else where the inputs are.
        layers: The layers with K and V.
    """
    known = _attention_modules(model.get_decoder()) or _attention_modules(model)
    hooked = _hooked_by_ancestors(model)
    found = {i: device for i in layers if i in known and (device := _device_of(known[i], hooked)) is not None}
    default = next(iter(found.values()), None) or input_device(model)
    return {i: found.get(i, default) for i in layers}


def input_device(model: Any) -> torch.device:
    """Where a transformers model's forward begins: there its inputs are made."""
    hooked = _hooked_by_ancestors(model)
    found = _device_of(_embedding(model), hooked) or _device_of(model, hooked)
    return found if found is not None else torch.device(model.device)


def is_spread(model: torch.nn.Module) -> bool:
    """Whether accelerate's hooks make parts of a model compute on different devices."""
    return len(set(filter(None, map(execution_device, model.modules())))) > 1


def _embedding(model: PreTrainedModel) -> torch.nn.Module:
    """The first module that a forward calls, or the model itself if that is not known."""
    with contextlib.suppress(NotImplementedError):
        embedding = model.get_input_embeddings()
        if isinstance(embedding, torch.nn.Module):
            return embedding
    return model


def _attention_modules(decoder: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """By layer the module that makes its K and V: of those that carry its number, the first that is called attention.

    In models that do not number their attention, layers are the items of the largest list of modules.
    """
    found: dict[int, torch.nn.Module] = {}
    for name in ("attention", ""):
        for module in decoder.modules():
            index = getattr(module, "layer_idx", None)
            if isinstance(index, int) and name in type(module).__name__.lower():
                found.setdefault(index, module)
    lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    largest = max(lists, key=_numel) if lists else torch.nn.ModuleList()
    for index, module in enumerate(largest):
        found.setdefault(index, module)
    return found


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _device_of(module: torch.nn.Module, inherited: dict[torch.nn.Module, torch.device]) -> torch.device | None:
    """That of the first hook in a module, else of a hook around it, else of its weights; None if these are nowhere."""
    hooked = filter(None, map(execution_device, module.modules()))
    around = filter(None, [inherited.get(module)])
    return next(chain(hooked, around, _weight_devices(module)), None)


def _weight_devices(module: torch.nn.Module) -> Iterator[torch.device]:
    return (x.device for x in chain(module.parameters(), module.buffers()) if not x.is_meta)


def _hooked_by_ancestors(model: torch.nn.Module) -> dict[torch.nn.Module, torch.device]:
    """For each module the device of the nearest hook around it."""
    inherited: dict[torch.nn.Module, torch.device] = {}
    for module in model.modules():  # parents come before their children
        device = execution_device(module) or inherited.get(module)
        if device is not None:
            inherited.update(dict.fromkeys(module.children(), device))
    return inherited
