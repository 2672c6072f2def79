"""Paged attention on CPU: the compiled kernel of `cpu_kernel.py`, run on the threads of torch.

The worker is a C function that the OpenMP runtime of torch calls on its own threads, so that attention and the matrix
products around it share one pool instead of competing for cores. benchmarks/README.md has the measurements behind this.
"""

import ctypes
import functools
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from paged_cache.kernels import cpu_kernel
from paged_cache.kernels.checks import check_shapes

MAX_ROWS = 32  # (query, head) pairs that walk over keys and values together
SERIAL_BYTES = 256 * 1024  # below this much K and V a second thread costs more than it brings

_KINDS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}  # see simd_memory.py
_PACK = struct.Struct(f"{len(cpu_kernel.INTEGERS)}q{len(cpu_kernel.REALS)}d").pack_into

logger = logging.getLogger("paged_cache")


_NOT_YET = ("cu_seqlens_q", "alibi_slopes", "position_bias", "kv_starts", "key_scales", "value_scales")


def supports(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, **options: object) -> str | None:
    """Why the kernel cannot take a call with these tensors, or None if it can."""
    if new := [name for name in _NOT_YET if options.get(name) is not None]:
        return f"{', '.join(new)}: not yet"
    if not (query.is_cpu and key_cache.is_cpu and value_cache.is_cpu):
        return "a tensor is not on the CPU"
    if query.dtype not in _KINDS:
        return f"queries are {query.dtype}, not float32, bfloat16 or float16"
    if key_cache.dtype not in _KINDS or value_cache.dtype is not key_cache.dtype:
        return f"keys are {key_cache.dtype} and values {value_cache.dtype}, not both float32, bfloat16 or float16"
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        return "the last dimension of keys or values is not contiguous"
    if query.requires_grad and torch.is_grad_enabled():
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
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """Causal attention through a block table; see `reference.paged_attention` for shapes and meaning.

    For tensors that `supports` takes. Compiles on the first call for a dtype.
    """
    batch, num_heads, q_len, dim = query.shape
    num_blocks, block_size, num_kv_heads, v_dim = value_cache.shape
    table_rows, width = block_table.shape
    fits = key_cache.shape == (num_blocks, block_size, num_kv_heads, dim) and num_heads % num_kv_heads == 0
    if not fits or table_rows != batch or seq_lens.shape[0] != batch or sinks is not None:
        check_shapes(query, key_cache, value_cache, block_table, seq_lens, sinks=sinks)  # says what is wrong
    dtype, kv_dtype = query.dtype, key_cache.dtype
    query = query if dtype is kv_dtype else query.float()
    query = query if query.stride(3) == 1 else query.contiguous()
    block_table, seq_lens = _int32(block_table), _int32(seq_lens)
    sinks = None if sinks is None else sinks.detach().float().contiguous()

    out = torch.empty((batch, q_len, num_heads, v_dim), dtype=query.dtype)
    group = num_heads // num_kv_heads
    rows_q = max(1, min(q_len, MAX_ROWS // group))
    items = batch * -(-q_len // rows_q) * num_kv_heads  # if each has one run
    runs = min(-(-width * block_size // cpu_kernel.RUN), cpu_kernel.MAX_RUNS)
    floats = items * runs * rows_q * group * ((v_dim + 15) // 16 * 16 + cpu_kernel.MORE) if runs > 1 else 0
    workspace = _threads.workspace
    if items > workspace.counters or floats > workspace.floats:
        workspace = _threads.workspace = _Workspace(max(items, workspace.counters), max(floats, workspace.floats))
    worker, element = _compile(kv_dtype)
    _PACK(
        workspace.record, 0,
        0,
        query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), block_table.data_ptr(), seq_lens.data_ptr(),
        out.data_ptr(), 0 if sinks is None else sinks.data_ptr(), workspace.partials, workspace.done,
        batch, num_heads, num_kv_heads, q_len, dim, v_dim, block_size,
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0), width,
        window or 0, chunk or 0, dtype is not kv_dtype, rows_q, 64 // element,
        scale, softcap or 0.0,
    )  # fmt: skip
    threads = torch.get_num_threads()
    if threads > 1 and batch * width * block_size * num_kv_heads * (dim + v_dim) * element > SERIAL_BYTES and _parallel:
        _parallel(worker, workspace.address, threads, 0)
    else:
        worker(workspace.address)
    return out if query.dtype is dtype else out.to(dtype)


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    """Block table or lengths as the kernel reads them."""
    if tensor.dtype is torch.int32 and tensor.stride(-1) == 1:
        return tensor
    return tensor.int().contiguous()


class _Workspace:
    """Memory that calls share: the record of the call, partial sums, counters of finished items (zero between calls)."""

    def __init__(self, counters: int, floats: int) -> None:
        self.counters, self.floats = counters, floats
        self.record = ctypes.create_string_buffer(cpu_kernel.CALL.itemsize)
        self.address = ctypes.addressof(self.record)
        self._done = torch.zeros(self.counters, dtype=torch.int64)
        self._partials = torch.empty(floats, dtype=torch.float32)
        self.done, self.partials = self._done.data_ptr(), self._partials.data_ptr()


class _Threads(threading.local):
    """Each Python thread that calls has a workspace of its own."""

    def __init__(self) -> None:
        self.workspace = _Workspace(64, 0)


_threads = _Threads()


@functools.cache
def _compile(dtype: torch.dtype) -> tuple[Callable[[int], None], int]:
    """The worker for keys and values of `dtype` as a C function, from numba's disk cache or compiled; bytes per element."""
    work, start = cpu_kernel.entry(_KINDS[dtype]), time.perf_counter()
    compiled: Any
    try:
        compiled = numba.cfunc("void(voidptr)", cache=True)(work)
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        logger.warning("The compiled CPU attention kernel is not kept for the next start: %s", error)
        compiled = numba.cfunc("void(voidptr)")(work)
    if not compiled.cache_hits:
        logger.info("Compiled the CPU attention kernel for %s in %.1f s.", dtype, time.perf_counter() - start)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address), dtype.itemsize


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
