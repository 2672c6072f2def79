"""A second face of a model: the same object in all but the methods that a class puts in front."""

from typing import Any

import torch


def shadow(model: torch.nn.Module, **methods: Any) -> Any:
    """An object that shares everything with `model` and answers to `methods` in its own way.

    transformers' `generate` and decoding loops call methods of the model they are given, so that they can be run with a
    forward of ours without a change to the model.
    """
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **methods}
    other: Any = object.__new__(type(kind.__name__, (kind,), names))
    object.__setattr__(other, "__dict__", model.__dict__)
    return other
