"""Computes with one adapter and leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import BASE
from .tuners import names_in

STATE = ("_active_adapter", "_disable_adapters")
"""What of peft's layers says which adapters are active. `set_adapter` would change which parameters have gradients, too."""


@contextmanager
def activated(tuners: list[Any], adapter_name: str) -> Iterator[None]:
    """While this is open the model computes with one adapter, or with "__base__" for none.

    Args:
        tuners: All of peft's layers in the model.
        adapter_name: Where a layer does not hold it, the layer is the base model's.
    """
    names = [adapter_name]
    with _restoring(tuners):
        for tuner in tuners:
            own = vars(tuner)
            own["_active_adapter"] = names if adapter_name in names_in(tuner) else []
            own["_disable_adapters"] = adapter_name == BASE
        yield


@contextmanager
def deactivated(tuners: list[Any]) -> Iterator[None]:
    """While this is open the model computes without adapters."""
    with _restoring(tuners):
        for tuner in tuners:
            vars(tuner)["_disable_adapters"] = True
        yield


@contextmanager
def _restoring(tuners: list[Any]) -> Iterator[None]:
    before = [{name: vars(tuner)[name] for name in STATE if name in vars(tuner)} for tuner in tuners]
    try:
        yield
    finally:
        for tuner, state in zip(tuners, before, strict=True):
            for name in STATE:
                vars(tuner).pop(name, None)
            vars(tuner).update(state)
