"""Chooses how K and V enter the blocks, and how blocks are copied."""

import functools
import importlib
import os
from types import ModuleType

import torch

from ..errors import InvalidRequestError
from . import reference

WRITERS = {"triton": "triton.cache", "cpu": "cpu_write"}
"""Names for `PAGED_CACHE_KERNEL` and the modules behind them; all else is the torch reference."""


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Writes new K and V into their slots, by the fastest kernel that takes the call; see `reference.write_kv`.

    Raises:
        InvalidRequestError: New tensors do not fit the caches or the slots.
    """
    for new, cache in ((keys, key_cache), (values, value_cache)):
        if new.shape != (slot_mapping.shape[0], *cache.shape[2:]):
            raise InvalidRequestError(
                f"{tuple(new.shape)} do not fit {slot_mapping.shape[0]} slots of a cache {tuple(cache.shape)}"
            )
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    traced = torch.compiler.is_compiling()
    writer = torch.ops.paged_cache if traced else _writer_for(keys, values, key_cache, value_cache)  # see `ops`
    writer.write_kv(keys, values, key_cache, value_cache, slot_mapping, **scales)


def copy_blocks(sources: list[torch.Tensor], destinations: list[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copies whole blocks in all layers at once, by the fastest kernel; see `reference.copy_blocks`."""
    if sources:
        writer = torch.ops.paged_cache if torch.compiler.is_compiling() else _writer_for(*destinations)
        writer.copy_blocks(sources, destinations, pairs)


def _writer_for(*tensors: torch.Tensor) -> ModuleType:
    """The module that takes these tensors."""
    default = {"cuda": "triton", "cpu": "cpu"}.get(tensors[-1].device.type, "reference")
    kernel = _module(os.environ.get("PAGED_CACHE_KERNEL") or default)
    return kernel if kernel is reference or kernel.supports(*tensors) is None else reference


@functools.cache
def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".{WRITERS[name]}", __package__)
    except (ImportError, KeyError):
        return reference
