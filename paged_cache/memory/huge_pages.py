"""CPU memory in pages of 2 MiB: blocks are read here and there, and each new page costs the processor a search."""

import mmap
import sys
from contextlib import suppress

import torch

HUGE_PAGE = 2 * 1024**2


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Like `torch.empty` on the CPU; on Linux large tensors ask the kernel for huge pages. Untouched ones take no memory."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if sys.platform == "linux" and nbytes >= HUGE_PAGE:
        with suppress(OSError, OverflowError):  # too much: torch says so
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError, AttributeError):  # a kernel, or a Python, without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device="cpu")
