"""Chooses the kernel for a call."""

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any

import torch

from ..errors import InvalidRequestError
from . import reference
from .checks import check_write
from .memo import REPEAT

logger = logging.getLogger("paged_cache")

VARIABLE = "PAGED_CACHE_KERNEL"
"""Environment variable that forces a kernel, by one of these names; it is read once:"""
KERNELS = ("reference", "triton", "cpu")
DEFAULTS = {"cuda": "triton", "cpu": "cpu"}
"""The kernel of each device type; the reference elsewhere."""


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
    `PAGED_CACHE_KERNEL` (reference, triton or cpu) forces one of them. The first call of each kind leaves a debug line; a
    forced kernel that is not there or does not take a call leaves a warning. While `torch.compile` traces, the call
    becomes an operator: see `ops`.

    Raises:
        InvalidRequestError: Shapes do not fit each other, or `PAGED_CACHE_KERNEL` is no kernel.
    """
    is_plain = sinks is None and alibi_slopes is None and position_bias is None and key_scales is None
    if is_plain and memo and not torch.compiler.is_compiling():
        repeat = memo.get((REPEAT, scale, window, chunk, softcap))
        same = block_table, seq_lens, cu_seqlens_q, kv_starts, max_q_len
        repeated: torch.Tensor | None = repeat(query, key_cache, value_cache, *same) if repeat is not None else None
        if repeated is not None:
            return repeated
    options = {
        "scale": scale,
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
    }
    if torch.compiler.is_compiling():
        return _in_graph(query, key_cache, value_cache, block_table, seq_lens, options)
    kernel = choose(query, key_cache, value_cache, options)
    return kernel.paged_attention(  # type: ignore[no-any-return]
        query, key_cache, value_cache, block_table, seq_lens, memo=memo, **options
    )


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
        InvalidRequestError: The new tensors, the caches, their scales and the slots do not fit each other.
    """
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    check_write(keys, values, key_cache, value_cache, slot_mapping, **scales)
    if torch.compiler.is_compiling():
        torch.ops.paged_cache.write_kv(keys, values, key_cache, value_cache, slot_mapping, **scales)
    else:
        writer = _writer(key_cache.device)
        writer.write_kv(keys, values, key_cache, value_cache, slot_mapping, **scales)


def copy_blocks(sources: list[torch.Tensor], destinations: list[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copies whole blocks in all layers at once, by the kernel of the device of `pairs`; see `reference.copy_blocks`."""
    if sources:
        copier = torch.ops.paged_cache if torch.compiler.is_compiling() else _writer(pairs.device)
        copier.copy_blocks(sources, destinations, pairs)


def choose(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, options: dict[str, Any]
) -> ModuleType:
    """The module whose `paged_attention` takes a call with these tensors and options."""
    kernel = _preferred(query.device)
    reason = None if kernel is reference else kernel.supports(query, key_cache, value_cache, **options)
    if (kernel, reason) not in _said:
        _said.add((kernel, reason))
        _say(kernel, reason, query, key_cache)
    return kernel if reason is None else reference


def forget() -> None:
    """Choose anew: the environment has changed."""
    _preferred.cache_clear()
    _writer.cache_clear()
    _said.clear()


_said: set[tuple[ModuleType, str | None]] = set()


def _say(kernel: ModuleType, reason: str | None, query: torch.Tensor, key_cache: torch.Tensor) -> None:
    call = f"paged attention of queries {tuple(query.shape)} {query.dtype} over blocks of {key_cache.dtype}"
    name, is_forced = kernel.__name__.removeprefix(f"{__package__}."), bool(os.environ.get(VARIABLE))
    if reason is None:
        logger.debug("%s runs on kernel %s%s", call, name, f", as {VARIABLE} wants it" if is_forced else "")
    else:
        level = logging.WARNING if is_forced else logging.DEBUG
        logger.log(level, "%s runs on the torch reference: kernel %s does not take it: %s", call, name, reason)


def _in_graph(*tensors_and_options: Any) -> torch.Tensor:
    """What a traced graph holds: an operator, or the reference where a gradient is asked for, which no operator has."""
    *tensors, options = tensors_and_options
    given = [x for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor)]
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    attend = reference.paged_attention if has_gradient else torch.ops.paged_cache.attention
    return attend(*tensors, **options)


@functools.cache
def _preferred(device: torch.device) -> ModuleType:
    """The kernel to ask first for tensors on a device."""
    name = os.environ.get(VARIABLE) or DEFAULTS.get(device.type, "reference")
    if name not in KERNELS:
        raise InvalidRequestError(f"{VARIABLE} is {name!r}; it has to be one of {', '.join(KERNELS)}.")
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        logger.warning("the %s kernel is not available (%s); attention runs on the torch reference", name, error)
        return reference


@functools.cache
def _writer(device: torch.device) -> ModuleType:
    """What writes and copies blocks on a device: a module beside the kernel that reads them, if it can."""
    kernel = _preferred(device)
    if kernel is reference:
        return reference
    writer = importlib.import_module(".cache", kernel.__name__)
    return writer if writer.supports(torch.empty(0, device=device)) is None else reference
