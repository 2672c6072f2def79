"""The Triton kernels that write and copy blocks, against the reference, bit for bit."""

import copy

import pytest
import torch
import triton
import triton.language as tl
from transformers import DynamicCache

import paged_cache
from paged_cache import PagedCache
from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import dispatch, reference
from paged_cache.kernels.triton import cache
from paged_cache.memory import storage
from tests.kernels.write_cases import KV_DTYPES, NEW_DTYPES, SHAPES, assert_same, bits, check, pool
from tests.models import assert_whole, model, poisoned_pool, prompts
from tests.test_quantized import ALWAYS, RoundedCache

DEVICE = "cpu" if cache.INTERPRETED else "cuda"
pytestmark = [] if cache.INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("new_dtype", NEW_DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_what_the_reference_writes(shape: tuple, kv_dtype: torch.dtype, new_dtype: torch.dtype) -> None:
    """All layouts, dtypes, heads of different numbers, tokens without a slot; nothing else is touched."""
    check(cache.write_kv, shape, kv_dtype, new_dtype, DEVICE)


@pytest.mark.parametrize(("new_dtype", "kv_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
def test_16_bits(new_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """The dtypes that models have are stored as they are or converted."""
    keys, values = (torch.randn(5, 2, 64, device=DEVICE).to(new_dtype) for _ in range(2))
    slots = torch.randperm(20, device=DEVICE)[:5]
    ours, expected = (pool(kv_dtype, "HND", 4, (2, 2), (64, 64), DEVICE) for _ in range(2))
    ours.write(cache.write_kv, keys, values, slots)
    expected.write(reference.write_kv, keys, values, slots)
    assert_same(ours, expected)


def test_no_tokens() -> None:
    """A forward of nothing but padding writes nothing."""
    nothing = torch.empty(0, 2, 64, device=DEVICE)
    ours, expected = (pool(torch.int8, "HND", 4, (2, 2), (64, 64), DEVICE) for _ in range(2))
    ours.write(cache.write_kv, nothing, nothing, torch.empty(0, dtype=torch.int64, device=DEVICE))
    ours.write(
        cache.write_kv, nothing.new_ones(1, 2, 64), nothing.new_ones(1, 2, 64), torch.tensor([-1], device=DEVICE)
    )
    assert_same(ours, expected)


@triton.jit
def _encode_all(x_ptr, codes_ptr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(codes_ptr + i, cache._to_e4m3(tl.load(x_ptr + i).to(tl.float32)))


def test_every_bfloat16_becomes_the_right_e4m3() -> None:
    """All 65,536 of them: as torch rounds them up to 448, saturated beyond, NaN as NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codes = torch.empty(2**16, dtype=torch.uint8, device=DEVICE)
    _encode_all[(16,)](x.to(DEVICE), codes, COUNT=4096)
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = codes.cpu().view(torch.float8_e4m3fn)
    assert torch.equal(bits(codes)[~x.isnan()], bits(expected)[~x.isnan()])
    assert codes.float()[x.isnan()].isnan().all()


def slabs(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random tensors."""
    return [torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes]


def test_copies_what_the_reference_copies() -> None:
    """Slabs of several sizes, dtypes and alignments, in one pool and between two, blocks longer than a program."""
    shapes = [(6, 3000), (6, 3000), (6, 16, 2, 8), (6, 7), (6, 0), (6, 3)]
    for source in (
        slabs(shapes),
        [x.transpose(1, 2) for x in slabs([(6, 4, 16, 8)])],
        [torch.randint(0, 255, (6, n), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn) for n in (9, 64)],
        [slabs([(6, 70)])[0][:, 3:43], slabs([(12, 64)])[0][::2]],
        slabs([(6, 5), (6, 4)], torch.bfloat16),
    ):
        pairs = torch.tensor([[0, 3], [2, 1], [0, 5]], device=DEVICE)
        ours, expected = ([x.clone(memory_format=torch.preserve_format) for x in source] for _ in range(2))
        cache.copy_blocks(ours, ours, pairs)
        reference.copy_blocks(expected, expected, pairs)
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(bits(mine), bits(theirs))
        cache.copy_blocks(source, ours, pairs.T.contiguous().T)
        reference.copy_blocks(source, expected, pairs)
        for mine, theirs in zip(ours, expected, strict=True):
            assert torch.equal(bits(mine), bits(theirs))
        cache.copy_blocks(ours, ours, pairs[:0])


def test_one_launch_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of one size are copied together."""
    launches = []
    copier = cache._copier
    monkeypatch.setattr(cache, "_copier", lambda *key: launches.append(key) or copier(*key))
    layers = slabs([(6, 64)] * 8 + [(6, 32)] * 8)
    cache.copy_blocks(layers, layers, torch.tensor([[1, 2]], device=DEVICE))
    assert len(launches) == 2
    assert all(torch.equal(layer[1], layer[2]) for layer in layers)


@pytest.mark.skipif(DEVICE == "cpu", reason="swapping is between a GPU and its host")
def test_swaps_with_pinned_memory() -> None:
    """Blocks go to pinned host memory and come back."""
    on_device = slabs([(6, 64)] * 3)
    before = [x.clone() for x in on_device]
    on_host = [torch.zeros(4, 64, pin_memory=True) for _ in on_device]
    cache.copy_blocks(on_device, on_host, torch.tensor([[5, 0], [2, 3]], device=DEVICE))
    for x in on_device:
        x.zero_()
    cache.copy_blocks(on_host, on_device, torch.tensor([[0, 5], [3, 2]], device=DEVICE))
    for x, y in zip(on_device, before, strict=True):
        assert torch.equal(x[[2, 5]], y[[2, 5]])
        assert not x[[0, 1, 3, 4]].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU can be waited for")
def test_copies_wait_for_nothing() -> None:
    """Not even for the addresses on their way to the device."""
    layers, pairs = slabs([(6, 64)] * 3), torch.tensor([[1, 2]], device=DEVICE)
    cache.copy_blocks(layers, layers, pairs)  # compiles
    cache._addresses.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.copy_blocks(layers, layers, pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(layer[1], layer[2]) for layer in layers)


def test_blocks_with_gaps_are_refused() -> None:
    """What cannot be copied as it lies is not copied at all."""
    gaps, plain = slabs([(6, 4, 8)])[0][:, :, :5], slabs([(6, 4, 5)])[0]
    for pair in ((gaps, gaps), (plain, slabs([(6, 5, 4)])[0]), (plain, plain.half())):
        with pytest.raises(InvalidRequestError, match="cannot be copied"):
            cache.copy_blocks(*([x] for x in pair), torch.tensor([[0, 1]], device=DEVICE))


def test_the_dispatcher_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes and copies of a pool on this device run here."""
    if DEVICE == "cpu":
        monkeypatch.setenv("PAGED_CACHE_KERNEL", "triton")
    calls = []
    monkeypatch.setattr(cache, "write_kv", lambda *_, **__: calls.append("write"))
    monkeypatch.setattr(cache, "copy_blocks", lambda *_: calls.append("copy"))
    new = torch.zeros(1, 2, 64, device=DEVICE)
    slots = torch.tensor([0], device=DEVICE)
    pool(torch.float32, "NHD", 4, (2, 2), (64, 64), DEVICE).write(dispatch.write_kv, new, new, slots)
    dispatch.copy_blocks([new], [new], torch.zeros(1, 2, dtype=torch.int64, device=DEVICE))
    assert calls == ["write", "copy"]


@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8_e4m3"])
def test_a_whole_model_on_the_kernels(kv_dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, in the order of CUDA pools: every write and copy runs here, attention reads what they leave."""
    if DEVICE == "cpu":
        monkeypatch.setenv("PAGED_CACHE_KERNEL", "triton")
        monkeypatch.setitem(storage.ORDERS, "cpu", "HND")
    launches = []
    for name in ("_writer", "_copier"):
        kernel = getattr(cache, name)
        monkeypatch.setattr(cache, name, lambda *key, name=name, kernel=kernel: launches.append(name) or kernel(*key))
    of = copy.deepcopy(model("llama")).to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in prompts((5, 14)).items()}
    mode = ALWAYS | {"max_new_tokens": 5, "num_beams": 3}
    exact = DynamicCache(config=of.config) if kv_dtype is None else RoundedCache(of.config, kv_dtype)
    expected = of.generate(**inputs, **mode, past_key_values=exact)
    target = poisoned_pool(of, kv_dtype=kv_dtype)
    with paged_cache.patch(of):
        tokens = of.generate(**inputs, **mode, past_key_values=PagedCache(target))
    assert torch.equal(tokens, expected)
    assert launches.count("_writer") == 5 * of.config.num_hidden_layers
    assert launches.count("_copier") > 0
    assert_whole(target)
