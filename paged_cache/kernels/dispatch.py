"""Chooses the kernel for a call."""

import importlib
import logging
import os
from functools import cache
from types import ModuleType

import torch

from ..errors import InvalidRequestError
from . import reference

logger = logging.getLogger("paged_cache")

KERNELS = {"reference": "reference", "triton": "triton_decode", "cpu": "cpu"}
"""Names for `PAGED_CACHE_KERNEL` and the modules behind them."""


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over blocks, by the fastest kernel that takes the call; see `reference.paged_attention`.

    CUDA tensors go to Triton, CPU tensors to the compiled kernel, all else to the reference. The environment variable
    `PAGED_CACHE_KERNEL` (reference, triton or cpu) forces one of them.
    """
    kernel = _kernel(os.environ.get("PAGED_CACHE_KERNEL") or _default(query.device.type))
    if kernel is not reference:
        reason = kernel.supports(query, key_cache, value_cache)
        if reason is not None:
            logger.debug("%s does not take this call: %s", kernel.__name__, reason)
            kernel = reference
    return kernel.paged_attention(  # type: ignore[no-any-return]
        query,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        scale=scale,
        window=window,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
    )


def _default(device_type: str) -> str:
    return {"cuda": "triton", "cpu": "cpu"}.get(device_type, "reference")


@cache
def _kernel(name: str) -> ModuleType:
    if name not in KERNELS:
        raise InvalidRequestError(f"PAGED_CACHE_KERNEL is {name!r}; it has to be one of {', '.join(KERNELS)}.")
    try:
        return importlib.import_module(f".{KERNELS[name]}", __package__)
    except ImportError as error:
        logger.warning("the %s kernel is not available (%s); attention runs on the torch reference", name, error)
        return reference
