"""The compiled CPU writers, against the reference, bit for bit."""

import pytest
import torch

pytest.importorskip("numba")

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import dispatch, reference
from paged_cache.kernels.cpu import cache as cpu_cache
from tests.kernels.write_cases import KV_DTYPES, NEW_DTYPES, SHAPES, assert_same, bits, check, pool


@pytest.mark.parametrize("new_dtype", [*NEW_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kv_dtype", [*KV_DTYPES, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_what_the_reference_writes(shape: tuple, kv_dtype: torch.dtype, new_dtype: torch.dtype) -> None:
    """All layouts, dtypes, heads of different numbers, tokens without a slot; nothing else is touched."""
    check(cpu_cache.write_kv, shape, kv_dtype, new_dtype)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_bfloat16_becomes_the_right_code(kv_dtype: torch.dtype) -> None:
    """All 65,536 of them, beside a number that makes the scale 1: those up to the largest code are rounded alike."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    largest = 127.0 if kv_dtype is torch.int8 else 448.0
    x = x[x.abs() <= largest]
    keys = torch.stack([x, torch.full_like(x, largest)], 1).view(-1, 1, 2)
    slots = torch.arange(len(x))
    new = torch.zeros(len(x) + 16 - len(x) % 16, 1, 2).to(kv_dtype).view(-1, 16, 1, 2)
    scales = torch.zeros(new.shape[:3])
    cpu_cache.write_kv(keys, keys, new, new.clone(), slots, key_scales=scales, value_scales=scales.clone())
    codes = new.flatten(0, 1)[: len(x), 0, 0]
    expected = x.float().round() if kv_dtype is torch.int8 else x.float()
    assert torch.equal(scales.flatten()[: len(x)], torch.ones(len(x)))
    assert torch.equal(bits(codes), bits(expected.to(kv_dtype)))


def test_the_dispatcher_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes into pools of 8 bits run here, unless the reference is asked for; both leave the same."""
    keys = torch.randn(3, 2, 64)
    pools = [pool(torch.int8, "NHD", 4, (2, 2), (64, 64)) for _ in range(2)]
    calls = []
    write = cpu_cache.write_kv
    monkeypatch.setattr(cpu_cache, "write_kv", lambda *args, **kwargs: calls.append(1) or write(*args, **kwargs))
    for target, name in zip(pools, ("cpu", "reference"), strict=True):
        monkeypatch.setenv("PAGED_CACHE_KERNEL", name)
        dispatch.forget()
        target.write(dispatch.write_kv, keys, keys, torch.tensor([5, -1, 2]))
    assert calls == [1]
    assert_same(*pools)


@pytest.mark.parametrize("shape", [(2, 2, 64), (3, 1, 64), (3, 2, 60)], ids=str)
def test_new_tensors_that_do_not_fit_are_refused(shape: tuple) -> None:
    """Nothing is read beyond a tensor."""
    target = pool(torch.int8, "NHD", 4, (2, 2), (64, 64))
    with pytest.raises(InvalidRequestError, match="do not fit"):
        target.write(dispatch.write_kv, torch.zeros(3, 2, 64), torch.zeros(shape), torch.arange(3))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_slots_beyond_the_cache_are_refused(kv_dtype: torch.dtype) -> None:
    """Nothing is written behind a tensor, nor before the refusal."""
    target, before = (pool(kv_dtype, "NHD", 4, (2, 2), (64, 64)) for _ in range(2))
    with pytest.raises(InvalidRequestError, match="slot 28 is beyond the 28 slots"):
        target.write(cpu_cache.write_kv, torch.ones(2, 2, 64), torch.ones(2, 2, 64), torch.tensor([3, 28]))
    assert_same(target, before)


def test_no_tokens() -> None:
    """A step without new tokens writes nothing."""
    target, before = (pool(torch.float32, "NHD", 4, (2, 2), (64, 64)) for _ in range(2))
    target.write(cpu_cache.write_kv, *torch.ones(2, 0, 2, 64), torch.arange(0))
    assert_same(target, before)


def test_copies() -> None:
    """Copies between pools of all dtypes, blocks as they lie."""
    slabs = [torch.randn(6, 8).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)]
    before = [x.clone() for x in slabs]
    dispatch.copy_blocks(slabs, slabs, torch.tensor([[0, 3], [2, 1]]))
    dispatch.copy_blocks([], [], torch.tensor([[0, 3]]))
    for x, y in zip(slabs, before, strict=True):
        assert torch.equal(bits(x), bits(y.view(torch.uint8).view(6, -1)[[0, 2, 2, 0, 4, 5]]))
    assert reference.copy_blocks is cpu_cache.copy_blocks
