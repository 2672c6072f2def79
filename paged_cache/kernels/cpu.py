"""Paged attention on CPU: the compiled kernel of `cpu_kernel.py` run on the threads of torch.

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

import numba
import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import cpu_kernel
from paged_cache.kernels.checks import check_shapes

MAX_ROWS = 32  # (query, head) pairs that walk over keys and values together
SERIAL_BYTES = 128 * 1024  # below this much K and V a second thread costs more than it brings

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ENTRIES = {torch.float32: cpu_kernel.float32, torch.bfloat16: cpu_kernel.bfloat16, torch.float16: cpu_kernel.float16}
_PACK = struct.Struct(f"{len(cpu_kernel.INTEGERS)}q{len(cpu_kernel.REALS)}d").pack_into

logger = logging.getLogger("paged_cache")


def supports(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> str | None:
    """Why the kernel cannot take a call with these tensors, or None if it can."""
    if not (query.is_cpu and key_cache.is_cpu and value_cache.is_cpu):
        return "a tensor is not on the CPU"
    if query.dtype not in _KINDS:
        return f"queries are {query.dtype}, not float32, bfloat16 or float16"
    if key_cache.dtype not in _KINDS or value_cache.dtype != key_cache.dtype:
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
) -> torch.Tensor:
    """Causal attention through a block table; see `reference.paged_attention` for shapes and meaning.

    Raises:
        InvalidRequestError: if `supports` gives a reason.
    """
    check_shapes(query, key_cache, value_cache, block_table, seq_lens, sinks)
    reason = supports(query, key_cache, value_cache)
    if reason is not None:
        raise InvalidRequestError(f"The CPU kernel cannot take this call: {reason}.")
    batch, num_heads, q_len, dim = query.shape
    _, block_size, num_kv_heads, v_dim = value_cache.shape
    out = torch.empty(batch, q_len, num_heads, v_dim, dtype=query.dtype)
    if batch == 0 or q_len == 0:
        return out
    if query.stride(3) != 1:
        query = query.contiguous()
    block_table, seq_lens = block_table.int().contiguous(), seq_lens.int().contiguous()
    if sinks is not None:
        sinks = sinks.detach().float().contiguous()
    group = num_heads // num_kv_heads
    rows_q = max(1, min(q_len, MAX_ROWS // group))
    units = batch * -(-q_len // rows_q)
    width = block_table.shape[1] * block_size
    runs = min(-(-width // cpu_kernel.RUN), cpu_kernel.MAX_RUNS + 1)
    row_floats = (v_dim + 15) // 16 * 16 + 16
    workspace = _workspace.reserve(
        units * num_kv_heads, runs > 1 and units * num_kv_heads * runs * rows_q * group * row_floats
    )
    _PACK(
        workspace.buffer, 0,
        0, query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), block_table.data_ptr(), seq_lens.data_ptr(),
        out.data_ptr(), 0 if sinks is None else sinks.data_ptr(), workspace.partials.data_ptr(), workspace.done.data_ptr(),
        batch, num_heads, num_kv_heads, q_len, dim, v_dim, block_size,
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3], block_table.stride(0), block_table.shape[1],
        window or 0, chunk or 0, _KINDS[query.dtype], rows_q,
        scale, softcap or 0.0,
    )  # fmt: skip
    worker = _compile(key_cache.dtype)
    kv_bytes = batch * num_kv_heads * width * (dim + v_dim) * key_cache.element_size()
    threads = torch.get_num_threads() if kv_bytes > SERIAL_BYTES else 1
    if threads > 1 and _parallel is not None:
        _parallel(worker, workspace.address, threads, 0)
    else:
        worker(workspace.address)
    return out


class _Workspace(threading.local):
    """Memory of one Python thread that calls share: the record of the call, partial sums, counters of finished items."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(cpu_kernel.CALL.itemsize)
        self.address = ctypes.addressof(self.buffer)
        self.partials = torch.empty(0, dtype=torch.float32)
        self.done = torch.zeros(64, dtype=torch.int64)  # the kernel leaves zeros behind

    def reserve(self, counters: int, floats: int) -> "_Workspace":
        if counters > self.done.numel():
            self.done = torch.zeros(2 * counters, dtype=torch.int64)
        if floats > self.partials.numel():
            self.partials = torch.empty(floats, dtype=torch.float32)
        return self


_workspace = _Workspace()


@functools.cache
def _compile(dtype: torch.dtype) -> Callable[[int], None]:
    """The worker for keys and values of `dtype` as a C function: from numba's disk cache, or compiled (seconds)."""
    start = time.perf_counter()
    compiled = numba.cfunc("void(voidptr)", cache=True)(_ENTRIES[dtype])
    if not compiled.cache_hits:
        seconds = time.perf_counter() - start
        logger.info(
            "Compiled the CPU attention kernel for %s in %.1f s; cached on disk for the next start.", dtype, seconds
        )
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


def _find_parallel() -> Callable[[Callable, int, int, int], None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP runtime that torch is linked to, if it has one."""
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (AttributeError, OSError):
        logger.debug("No OpenMP runtime found in %s: the CPU attention kernel uses one thread.", library)
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _forget_threads() -> None:
    """After a fork the threads of the parent's pool do not exist."""
    global _parallel
    _parallel = None


_parallel = _find_parallel()
os.register_at_fork(after_in_child=_forget_threads)
