"""Chooses the kernel for a call."""

import importlib
import logging
import os
from functools import cache
from types import ModuleType
from typing import Any

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
    cu_seqlens_q: torch.Tensor | None = None,
    max_q_len: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    memo: dict[Any, Any] | None = None,
) -> torch.Tensor:
    """Attention over blocks, by the fastest kernel that takes the call; see `reference.paged_attention`.

    CUDA tensors go to Triton, CPU tensors to the compiled kernel, all else to the reference. The environment variable
    `PAGED_CACHE_KERNEL` (reference, triton or cpu) forces one of them. The first call of each kind leaves a debug line.
    """
    options = {
        "cu_seqlens_q": cu_seqlens_q,
        "max_q_len": max_q_len,
        "window": window,
        "chunk": chunk,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "position_bias": position_bias,
        "kv_starts": kv_starts,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "memo": memo,
    }
    kernel = _kernel(os.environ.get("PAGED_CACHE_KERNEL") or _default(query.device.type))
    reason = kernel.supports(query, key_cache, value_cache, **options) if kernel is not reference else None
    _say(kernel.__name__, reason)
    kernel = kernel if reason is None else reference
    return kernel.paged_attention(  # type: ignore[no-any-return]
        query, key_cache, value_cache, block_table, seq_lens, scale=scale, **options
    )


@cache
def _say(kernel: str, reason: str | None) -> None:
    name = kernel.rpartition(".")[2]
    if reason is None:
        logger.debug("paged attention runs on kernel %s", name)
    else:
        logger.debug("paged attention runs on the torch reference: kernel %s does not take the call: %s", name, reason)


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
