"""Tells quickly whether an adapter is what it was, while its rows run."""

from collections.abc import Hashable
from typing import Any

import torch

from ..bits import sums
from .tuners import parts_of


class Glance:
    """The tensors of adapters, found once.

    Args:
        tuners: All of peft's layers in the model.
    """

    def __init__(self, tuners: list[Any]) -> None:
        self._tuners = tuners
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._scalings = [scaling for tuner in tuners if isinstance(scaling := vars(tuner).get("scaling"), dict)]

    def at(self, adapter_name: str | None) -> Hashable:
        """Changes with places, version counters and scalings of all of an adapter, and with the bits of its outermost tensors.

        So that a swap through `.data`, which no counter sees, shows as well: it writes to all of an adapter.

        Args:
            adapter_name: None for all adapters that are active anywhere.
        """
        if adapter_name is not None:
            return self._at(adapter_name)
        return tuple(self._at(name) for name in sorted({name for t in self._tuners for name in t.active_adapters}))

    def _at(self, name: str) -> Hashable:
        if name not in self._places:
            self._places[name] = [place for tuner in self._tuners for place in parts_of(tuner, name)]
        tensors: list[torch.Tensor] = [x for own, key in self._places[name] if (x := own.get(key)) is not None]
        seen = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)
        ends = [x for x in (*tensors[:2], *tensors[-2:]) if not x.is_meta]
        return seen, sums(ends), tuple(scaling.get(name) for scaling in self._scalings)
