"""Paged attention on CPU: the compiled kernel of `kernel.py`, run on the threads of torch.

The worker is a C function that the OpenMP runtime of torch calls on its own threads, so that attention and the matrix
products around it share one pool instead of competing for cores. benchmarks/README.md has the measurements behind this.
"""

import ctypes
import functools
import logging
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paged_cache.kernels.checks import check_contents, check_shapes
from paged_cache.kernels.quantized import LARGEST

from . import kernel
from .compiling import compile_worker

MAX_ROWS = 32  # (query, head) pairs of a kv head that walk over keys and values together
SERIAL_BYTES = 256 * 1024  # below this much K and V a second thread costs more than it brings
E4M3_UNIT = 256.0  # see `simd_memory`

_QUERY_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # index of kernel.QUERY_KINDS
_KINDS = {  # see simd_memory.py
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.int8: np.int8(0),
    torch.float8_e4m3fn: np.uint8(0),
}
_PACK = struct.Struct(f"{len(kernel.INTEGERS)}q{len(kernel.REALS)}d").pack_into
_NO_STRIDES = (0, 0, 0)

logger = logging.getLogger("paged_cache")


def supports(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, **options: Any) -> str | None:
    """Why the kernel cannot take a call with these tensors, or None if it can."""
    if not (query.is_cpu and key_cache.is_cpu and value_cache.is_cpu):
        return "a tensor is not on the CPU"
    if query.dtype not in _QUERY_KINDS:
        return f"queries are {query.dtype}, not float32, bfloat16 or float16"
    if key_cache.dtype not in _KINDS or value_cache.dtype is not key_cache.dtype:
        return f"keys are {key_cache.dtype} and values {value_cache.dtype}, not both of one of {list(_KINDS)}"
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        return "the last dimension of keys or values is not contiguous"
    if torch.is_grad_enabled():
        others = (options.get(name) for name in ("sinks", "alibi_slopes", "position_bias"))
        if any(x is not None and x.requires_grad for x in (query, *others)):
            return "a gradient is asked for"
    return None


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
    """Causal attention through a block table; see `reference.paged_attention` for shapes and meaning.

    For tensors that `supports` takes. Compiles on the first call for a dtype of the cache.
    """
    options = (window, chunk, softcap, sinks, alibi_slopes, position_bias, kv_starts, key_scales, value_scales)
    _check(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max_q_len, options)
    if memo is None:  # with one, the caller has prepared tables for many calls
        check_contents(block_table, key_cache.shape[0], cu_seqlens_q, max_q_len, query.shape[2])
    num_rows, num_heads, q_len, dim = query.shape
    _, block_size, num_kv_heads, v_dim = value_cache.shape
    batch, width = block_table.shape
    out = query.new_empty((num_rows, q_len, num_heads, v_dim))
    query = query if query.stride(3) == 1 else query.contiguous()
    # Each tensor that is made here has to live until the kernel has run.
    block_table, seq_lens, cu_seqlens_q, kv_starts = map(_int32, (block_table, seq_lens, cu_seqlens_q, kv_starts))
    sinks, alibi_slopes, position_bias = _float32(sinks), _float32(alibi_slopes), _float32(position_bias)

    q_len, element = q_len if max_q_len is None else max_q_len, key_cache.element_size()
    is_small = batch * width * block_size * num_kv_heads * (dim + v_dim) * element <= SERIAL_BYTES
    threads = 1 if is_small or not _parallel else torch.get_num_threads()
    rows_q, heads, workspace = _plan(batch, q_len, num_heads, num_kv_heads, dim, v_dim, width * block_size, threads)
    _PACK(
        workspace.record, 0,
        0, 0,
        query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), block_table.data_ptr(), seq_lens.data_ptr(),
        out.data_ptr(), _address(kv_starts), _address(cu_seqlens_q), _address(sinks), _address(alibi_slopes),
        _address(position_bias), _address(key_scales), _address(value_scales),
        workspace.partials, workspace.done, workspace.scratch,
        batch, num_heads, num_kv_heads, q_len, dim, v_dim, block_size,
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
        *(_NO_STRIDES if key_scales is None else key_scales.stride()),
        *(_NO_STRIDES if value_scales is None else value_scales.stride()),
        *((0, 0, 0, 0) if position_bias is None else _bias_strides(position_bias)),
        block_table.stride(0), width, window or 0, chunk or 0, _QUERY_KINDS[query.dtype], rows_q, heads, element,
        scale, softcap or 0.0, E4M3_UNIT if key_cache.dtype is torch.float8_e4m3fn else 1.0,
    )  # fmt: skip
    worker = _compile(key_cache.dtype)
    if threads > 1 and _parallel:
        _parallel(worker, workspace.address, threads, 0)
    else:
        worker(workspace.address)
    return out


_OPTIONS = (
    "window", "chunk", "softcap", "sinks", "alibi_slopes", "position_bias", "kv_starts", "key_scales", "value_scales"
)  # fmt: skip


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int | None,
    options: tuple[Any, ...],
) -> None:
    """`check_shapes`, and less time for what is plainly right."""
    if (
        query.dim() != 4
        or key_cache.dim() != 4
        or key_cache.shape[:3] != value_cache.shape[:3]
        or key_cache.shape[3] != query.shape[3]
        or key_cache.shape[2] == 0
        or query.shape[1] % key_cache.shape[2]
        or seq_lens.shape != query.shape[:1]
        or block_table.dim() != 2
        or block_table.shape[0] != query.shape[0]
        or not (block_table.is_cpu and seq_lens.is_cpu)
        or key_cache.dtype in LARGEST
        or cu_seqlens_q is not None
        or max_q_len is not None
        or any(x is not None for x in options)
    ):
        named: dict[str, Any] = dict(zip(_OPTIONS, options, strict=True))
        named |= {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max_q_len}
        check_shapes(query, key_cache, value_cache, block_table, seq_lens, **named)


def _plan(
    batch: int, q_len: int, num_heads: int, num_kv_heads: int, dim: int, v_dim: int, kv_len: int, threads: int
) -> tuple[int, int, "_Workspace"]:
    """How a call is cut into items, queries and kv heads of each, and memory for it."""
    group, v_width = num_heads // num_kv_heads, -(-v_dim // 16) * 16
    rows_q = max(1, min(q_len, MAX_ROWS // group))
    tiles, runs = -(-q_len // rows_q), -(-kv_len // kernel.RUN)
    items = min(tiles * runs, kernel.MAX_RUNS + tiles) * batch  # at most, if each has all heads
    heads = num_kv_heads  # as many as have room in the first-level cache; fewer if threads would have nothing to do
    while heads > 1 and (
        num_kv_heads % heads or heads * rows_q * group > MAX_ROWS or items * num_kv_heads < threads * heads
    ):
        heads -= 1
    rows, slices = rows_q * group * heads, num_kv_heads // heads
    partials = items * slices * rows * (v_width + kernel.MORE) if runs > 1 else 0
    scratch = threads * sum(kernel.scratch_floats(rows, heads, -(-dim // 16) * 16, v_width))
    return rows_q, heads, _workspace(batch * tiles * slices, partials, scratch)


def _int32(tensor: Any) -> Any:
    """Block table or lengths as the kernel reads them; None stays."""
    if tensor is None or (tensor.dtype is torch.int32 and tensor.stride(-1) == 1):
        return tensor
    return tensor.int().contiguous()


def _float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to scores as the kernel reads it."""
    if tensor is None:
        return None
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bias_strides(bias: torch.Tensor) -> tuple[int, ...]:
    """One row of bias may serve the whole batch."""
    row, head, query, _ = bias.stride()
    return 0 if bias.shape[0] == 1 else row, head, query, bias.shape[3]


class _Workspace:
    """Memory that calls share: the record of the call, counters of finished items, partial sums, what threads work with.

    The counters are zero between calls.
    """

    def __init__(self, counters: int, partials: int, scratch: int) -> None:
        self.sizes = counters, partials, scratch
        self.record = ctypes.create_string_buffer(kernel.CALL.itemsize)
        self.address = ctypes.addressof(self.record)
        self._tensors = (
            torch.zeros(counters, dtype=torch.int64, device="cpu"),
            *(torch.empty(floats, dtype=torch.float32, device="cpu") for floats in (partials, scratch)),
        )
        self.done, self.partials, self.scratch = (x.data_ptr() for x in self._tensors)


class _Threads(threading.local):
    """Each Python thread that calls has a workspace of its own."""

    def __init__(self) -> None:
        self.workspace = _Workspace(64, 0, 0)


_threads = _Threads()


def _workspace(counters: int, partials: int, scratch: int) -> _Workspace:
    """The workspace of this Python thread, with room for so many counters and floats."""
    workspace = _threads.workspace
    sizes = workspace.sizes
    if counters > sizes[0] or partials > sizes[1] or scratch > sizes[2]:
        wanted = zip(sizes, (counters, partials, scratch), strict=True)
        workspace = _threads.workspace = _Workspace(*(max(pair) for pair in wanted))
    return workspace


@functools.cache
def _compile(dtype: torch.dtype) -> Callable[[int], None]:
    """The worker for keys and values of `dtype` as a C function."""
    return compile_worker(kernel.entry(_KINDS[dtype]), f"attention over a {dtype} cache")


def _find_parallel() -> Callable[[Callable[[int], None], int, int, int], None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP runtime that torch is linked to, if it has one."""
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (AttributeError, OSError):
        logger.debug("No OpenMP runtime found through %s: the CPU attention kernel uses one thread.", library)
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _forget_threads() -> None:
    """A forked child has none of the threads that the parent's pool still counts on."""
    global _parallel
    _parallel = None


_parallel = _find_parallel()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
