"""Layers that peft leaves around those of a model when it takes their last adapter out."""

from typing import Any

import torch

from .tuners import names_in, split

_INNER = ("original_module", "base_layer")
"""What peft calls the layer inside of one of its own."""


class Wrapping:
    """Remembers which of peft's layers came with adapters from folders, and takes those away that hold none any more.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._others: set[torch.nn.Module] = set()
        self._ours: set[torch.nn.Module] = set()

    def begin(self) -> None:
        """An adapter is about to be loaded: layers that come from now on are ours."""
        self._others = set(split(self._model)[1]) - self._ours

    def clear(self) -> None:
        """Puts the model's own layers back where nothing is left to add to them."""
        self._ours = {tuner for tuner in split(self._model)[1] if tuner not in self._others}
        empty = {tuner for tuner in self._ours if not names_in(tuner)}
        if empty:
            for parent in list(self._model.modules()):
                for name, child in parent._modules.items():
                    parent._modules[name] = _inside(child, empty)
            self._ours -= empty


def _inside(module: Any, empty: set[torch.nn.Module]) -> Any:
    """The layer inside of as many empty ones as there are."""
    while module in empty:
        module = next(module._modules[name] for name in _INNER if name in module._modules)
    return module
