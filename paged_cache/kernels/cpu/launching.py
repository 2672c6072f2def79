"""How a call of the CPU kernel is run: on the threads of torch, in memory that calls share.

The worker is a C function that the OpenMP runtime of torch calls on its own threads, so that attention and the matrix
products around it share one pool instead of competing for cores. benchmarks/README.md has the measurements behind this.
"""

import ctypes
import functools
import logging
import os
import struct
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import kernel, record
from .compiling import compile_worker

KINDS = {  # see simd_memory.py
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.int8: np.int8(0),
    torch.float8_e4m3fn: np.uint8(0),
}
_ADDRESSES = struct.Struct(f"{len(record.COUNTERS + record.VARYING)}q")
_PACK_ADDRESSES = _ADDRESSES.pack_into
_PACK_REST = struct.Struct(f"{len(record.INTEGERS)}q{len(record.REALS)}d").pack_into

logger = logging.getLogger("paged_cache")


class Workspace:
    """Memory that calls share: counters of finished items, partial sums, what threads work with.

    The counters are zero between calls.
    """

    def __init__(self, counters: int, partials: int, scratch: int) -> None:
        self.sizes = counters, partials, scratch
        self._tensors = (
            torch.zeros(counters, dtype=torch.int64, device="cpu"),
            *(torch.empty(floats, dtype=torch.float32, device="cpu") for floats in (partials, scratch)),
        )
        self.done, self.partials, self.scratch = (x.data_ptr() for x in self._tensors)


class _Threads(threading.local):
    """Each Python thread that calls has a workspace of its own."""

    def __init__(self) -> None:
        self.workspace = Workspace(64, 0, 0)


_threads = _Threads()


def workspace(counters: int, partials: int, scratch: int) -> Workspace:
    """The workspace of this Python thread, with room for so many counters and floats."""
    present = _threads.workspace
    sizes = present.sizes
    if counters > sizes[0] or partials > sizes[1] or scratch > sizes[2]:
        wanted = zip(sizes, (counters, partials, scratch), strict=True)
        present = _threads.workspace = Workspace(*(max(pair) for pair in wanted))
    return present


class Launch:
    """All calls of one kind in a step: only addresses change from layer to layer.

    Args:
        dtype: Of the cache.
        num_threads: That work together.
        workspace: What they work with.
        rest: The record without counters and varying addresses.
        copies: Tensors that `rest` has addresses of and that nobody else keeps.
    """

    def __init__(
        self, dtype: torch.dtype, num_threads: int, workspace: Workspace, rest: tuple[float, ...], copies: list[Any]
    ) -> None:
        self._worker, self._num_threads = _compile(dtype), num_threads
        self._workspace, self.copies = weakref.ref(workspace), copies
        self._record = ctypes.create_string_buffer(record.CALL.itemsize)
        self._address = ctypes.addressof(self._record)
        _PACK_REST(self._record, _ADDRESSES.size, *rest)

    @property
    def is_ours(self) -> bool:
        """Whether its workspace is that of the Python thread that asks."""
        return self._workspace() is _threads.workspace

    def run(self, *addresses: int) -> None:
        """Computes a call, with addresses in the order of `record.VARYING`."""
        _PACK_ADDRESSES(self._record, 0, 0, 0, *addresses)
        if self._num_threads > 1 and _parallel:
            _parallel(self._worker, self._address, self._num_threads, 0)
        else:
            self._worker(self._address)


def num_threads() -> int:
    """How many threads may work together."""
    return torch.get_num_threads() if _parallel else 1


@functools.cache
def _compile(dtype: torch.dtype) -> Callable[[int], None]:
    """The worker for keys and values of `dtype` as a C function."""
    return compile_worker(kernel.entry(KINDS[dtype]), f"attention over a {dtype} cache")


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
