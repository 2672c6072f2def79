"""CPU memory in pages of 2 MiB: blocks are read here and there, and each new page costs the processor a search."""

import mmap
import sys
from contextlib import suppress

import torch

HUGE_PAGE = 2 * 1024**2


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Like `torch.empty` on the CPU; on Linux large tensors ask the kernel for huge pages. Untouched ones take no memory."""
    numel = torch.Size(shape).numel()
    nbytes = numel * dtype.itemsize
    if sys.platform != "linux" or nbytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel, or a Python, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
