"""Large CPU tensors of a pool live in memory of their own."""

import sys

import pytest
import torch

from paged_cache.memory import huge_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_large_tensors_are_plain_tensors(dtype: torch.dtype) -> None:
    """Shape, dtype and size are those that were asked for; all of it can be written, and outlives other references."""
    rows = huge_pages.HUGE_PAGE // 1000
    tensor = huge_pages.empty((rows + 1, 1001), dtype)

    tensor.view(torch.uint8)[:] = 1
    last = tensor[-1]
    del tensor

    assert last.shape == (1001,)
    assert last.dtype is dtype
    assert last.storage_offset() == rows * 1001
    assert (last.view(torch.uint8) == 1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are marked, small ones not; a kernel that refuses changes nothing."""
    asked = []

    class Memory(huge_pages.mmap.mmap):
        def madvise(self, option: int) -> None:
            asked.append(option)
            raise OSError("no huge pages here")

    monkeypatch.setattr(huge_pages.mmap, "mmap", Memory)
    huge_pages.empty((huge_pages.HUGE_PAGE - 1,), torch.int8)
    assert not asked
    assert huge_pages.empty((huge_pages.HUGE_PAGE,), torch.int8).sum() == 0
    assert asked == [huge_pages.mmap.MADV_HUGEPAGE]


def test_too_much_is_torch_s_error() -> None:
    """The message names the bytes, as it does for any other tensor."""
    with pytest.raises(RuntimeError, match="allocate"):
        huge_pages.empty((1 << 50,), torch.int8)
