"""Pools of 8 bits: `generate` gives the tokens of a cache that is not paged and rounds what it stores in the same way."""

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache

import paged_cache
from paged_cache import BlockPool, InvalidRequestError, PagedCache, attention
from paged_cache.kernels.quantized import dequantize, quantize
from paged_cache.memory import storage
from tests.architectures.runs import checks_of, run
from tests.architectures.tiny import ARCHITECTURES, build
from tests.models import KINDS, TokenCounter, assert_whole, maybe_patched, model, poisoned_pool, prompts

ALWAYS = {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None, "do_sample": False, "repetition_penalty": 1.5}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "prefill in chunks": {"prefill_chunk_size": 7},
}
KV_DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
UNUSUAL = [
    "bloom", "mpt", "bamba", "zamba2", "minimax_m3_vl_text", "deepseek_v32", "minicpm3", "gemma3n_text", "mamba",
    "s2s:t5", "s2s:bart",
]  # fmt: skip
both_ways = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
every_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


class RoundedCache(DynamicCache):
    """Rounds K and V to 8 bits and back. The first forward sees its own K and V as they are, as in a `PagedCache`."""

    def __init__(self, config, kv_dtype):
        super().__init__(config=config)
        self.kv_dtype = KV_DTYPES[kv_dtype]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        is_first = self.get_seq_length(layer_idx) == 0
        rounded = (dequantize(*quantize(x, self.kv_dtype)).to(x.dtype) for x in (key_states, value_states))
        stored = super().update(*rounded, layer_idx, *args, **kwargs)
        return (key_states, value_states) if is_first else stored


@contextlib.contextmanager
def kernel_calls(monkeypatch):
    """The scales that kernels were called with."""
    calls, kernel = [], attention.paged_attention
    with monkeypatch.context() as patch:
        patch.setattr(attention, "paged_attention", lambda *a, **k: calls.append(k["key_scales"]) or kernel(*a, **k))
        yield calls


def assert_same_tokens(of, kv_dtype, patched, inputs, **mode):
    """Of a `RoundedCache` and of a `PagedCache`; the exact ones are others."""
    torch.manual_seed(3)
    expected = of.generate(**inputs, **ALWAYS | mode, past_key_values=RoundedCache(of.config, kv_dtype))
    pool = poisoned_pool(of, kv_dtype=kv_dtype)
    with maybe_patched(of, patched):
        torch.manual_seed(3)
        actual = of.generate(**inputs, **ALWAYS | mode, past_key_values=PagedCache(pool))
    assert torch.equal(actual, expected)
    assert_whole(pool)
    return pool


@both_ways
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention(kind, kv_dtype, patched):
    """Beams over a padded batch, on all kinds of K and V: windows, sinks, latents, states beside them."""
    pool = assert_same_tokens(model(kind), kv_dtype, patched, prompts(), **MODES["beams"])
    assert pool.stats().cow_copies > 0


@both_ways
@pytest.mark.parametrize("name", [name for name in UNUSUAL if name in ARCHITECTURES])
def test_unusual_architectures(name, patched):
    """ALiBi, biases, shared layers, states, indexers, latents, encoders: quantised where they use the pool."""
    of, extra_inputs = build(name)
    check = checks_of(name)[0]
    rounded = RoundedCache(of.config.get_text_config(decoder=True), "int8")
    expected = run(of, extra_inputs, check, rounded)
    pool = poisoned_pool(of, kv_dtype="int8")
    cache = PagedCache(pool)
    with maybe_patched(of, patched):
        tokens = run(of, extra_inputs, check, cache)
    assert torch.equal(tokens, expected)
    assert pool.kv_dtype is torch.int8
    del cache
    assert_whole(pool)


@both_ways
@every_dtype
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_modes(order, mode, kv_dtype, patched, monkeypatch):
    """All modes of `generate`, in either order of a block's dimensions; a patched model reads codes and scales in place."""
    monkeypatch.setitem(storage.ORDERS, "cpu", order)
    with kernel_calls(monkeypatch) as calls:
        assert_same_tokens(model("llama"), kv_dtype, patched, prompts(), **MODES[mode])
    assert bool(calls) == patched
    assert all(scales is not None for scales in calls)


@both_ways
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_heads_first_without_quantisation(kind, patched, monkeypatch):
    """The order of CUDA pools gives the same tokens on the CPU."""
    monkeypatch.setitem(storage.ORDERS, "cpu", "HND")
    of, pool = model(kind), poisoned_pool(model(kind))
    assert pool.storage.layers[0].keys.stride(1) == pool.storage.layers[0].keys.shape[3]
    expected = of.generate(**prompts(), **ALWAYS | MODES["beams"], past_key_values=DynamicCache(config=of.config))
    with maybe_patched(of, patched):
        actual = of.generate(**prompts(), **ALWAYS | MODES["beams"], past_key_values=PagedCache(pool))
    assert torch.equal(actual, expected)
    assert_whole(pool)


@both_ways
@every_dtype
def test_drafted_tokens_are_taken_back(kv_dtype, patched):
    """Prompt lookup crops the cache."""
    inputs = {"input_ids": prompts((24,))["input_ids"].repeat(1, 2)}
    assert_same_tokens(model("llama"), kv_dtype, patched, inputs, prompt_lookup_num_tokens=3)


@both_ways
@every_dtype
def test_forks_and_conversations(kv_dtype, patched):
    """A copy of the cache goes on as the cache itself does, turn by turn."""
    of, inputs = model("llama"), prompts((9, 9))
    pool = poisoned_pool(of, kv_dtype=kv_dtype)
    caches = [RoundedCache(of.config, kv_dtype), PagedCache(pool)]
    with maybe_patched(of, patched):
        for turn in range(3):
            forks = [copy.deepcopy(cache) for cache in caches]
            tokens = [of.generate(**inputs, **ALWAYS, past_key_values=cache) for cache in (*caches, *forks)]
            assert all(torch.equal(tokens[0], x) for x in tokens[1:]), turn
            ids = torch.cat([tokens[0], tokens[0][:, :2]], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    del caches, forks
    assert_whole(pool)


@every_dtype
def test_a_known_prefix_is_read_as_it_was_stored(kv_dtype):
    """The second prompt computes only its own tokens, on the rounded K and V of the first."""
    of = model("llama")
    first, second = (torch.cat([prompts((16,))["input_ids"], prompts((7,), seed=n)["input_ids"]], 1) for n in (2, 3))
    rounded = RoundedCache(of.config, kv_dtype)
    pool = poisoned_pool(of, kv_dtype=kv_dtype)
    with torch.no_grad():
        of(first[:, :16], past_key_values=rounded)
    expected = of.generate(second, **ALWAYS, past_key_values=rounded)
    with paged_cache.patch(of):
        of.generate(first, **ALWAYS, past_key_values=PagedCache(pool))
        with TokenCounter(of) as counter:
            actual = of.generate(second, **ALWAYS, past_key_values=PagedCache(pool))
    assert torch.equal(actual, expected)
    assert counter.tokens == 7 + ALWAYS["max_new_tokens"] - 1
    assert_whole(pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_dtype
def test_half_precision(kv_dtype, dtype):
    """K and V come back in the model's dtype, patched or not, next to what was written."""
    of = copy.deepcopy(model("llama")).to(dtype)
    pool = poisoned_pool(of, kv_dtype=kv_dtype)
    assert (pool.dtype, pool.kv_dtype) == (dtype, KV_DTYPES[kv_dtype])
    cache, exact = PagedCache(pool), DynamicCache(config=of.config)
    with torch.no_grad():
        for other in (cache, exact):
            of(prompts((21,))["input_ids"], past_key_values=other)
        mine, theirs = cache.layers[1].keys, exact.layers[1].keys
        assert mine.dtype is dtype
        error = (mine.float() - theirs.float()).abs().amax(-1) / theirs.float().abs().amax(-1)
        assert 0 < error.max() < (0.01 if kv_dtype == "int8" else 0.05)
        plain = of(torch.tensor([[5]]), past_key_values=cache.fork()).logits
        with paged_cache.patch(of):
            patched = of(torch.tensor([[5]]), past_key_values=cache).logits
    torch.testing.assert_close(patched, plain, atol=0.1, rtol=0.1)


def test_bytes_are_exact():
    """What `bytes_per_token`, `nbytes`, `describe` and `memory=` say counts the scales."""
    of = model("llama")
    config, full = of.config, BlockPool.for_model(of, num_blocks=8)
    heads, dim, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    for kv_dtype in KV_DTYPES:
        pool = BlockPool.for_model(of, num_blocks=8, kv_dtype=kv_dtype)
        assert pool.bytes_per_token == layers * heads * 2 * (dim + 4)
        assert pool.nbytes == pool.stats().nbytes == pool.num_tokens * pool.bytes_per_token
        assert pool.nbytes == sum(x.nbytes for x in pool.storage._slabs)
        assert f"{pool.bytes_per_token} bytes per token" in pool.describe()
        assert str(KV_DTYPES[kv_dtype]) in pool.describe()
        same = BlockPool.for_model(of, memory=full.nbytes, kv_dtype=kv_dtype)
        assert same.num_blocks == full.nbytes // (pool.bytes_per_token * pool.block_size)
        assert same.nbytes <= full.nbytes


@pytest.mark.parametrize(
    ("arguments", "kv_dtype", "dtype"),
    [
        ({}, torch.float32, torch.float32),
        ({"kv_dtype": "auto", "dtype": torch.float64}, torch.float64, torch.float64),
        ({"kv_dtype": torch.int8}, torch.int8, torch.float32),
        ({"dtype": torch.float8_e4m3fn}, torch.float8_e4m3fn, torch.float32),
        ({"dtype": torch.int8, "kv_dtype": "int8"}, torch.int8, torch.float32),
        ({"dtype": torch.bfloat16, "kv_dtype": "fp8_e4m3"}, torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_names_and_dtypes(arguments, kv_dtype, dtype):
    """Names, torch's dtypes and both arguments together."""
    pool = BlockPool.for_model(model("llama"), num_blocks=2, **arguments)
    assert (pool.kv_dtype, pool.dtype) == (kv_dtype, dtype)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_dtype": "fp8"}, r"'fp8'.*'auto', 'int8', 'fp8_e4m3'"),
        ({"kv_dtype": torch.float8_e5m2}, r"float8_e5m2.*'int8'"),
        ({"kv_dtype": 8}, r"8.*'int8'"),
        ({"kv_dtype": ["int8"]}, r"\['int8'\]"),
        ({"dtype": torch.int8, "kv_dtype": "fp8_e4m3"}, r"dtype=torch.int8 and kv_dtype='fp8_e4m3' contradict"),
        ({"dtype": torch.float8_e4m3fn, "kv_dtype": "auto"}, r"torch.float8_e4m3fn and kv_dtype='auto' contradict"),
        ({"dtype": torch.int16}, r"torch.int16.*torch.int8"),
        ({"dtype": "int8"}, r"'int8'.*torch.int8"),
        ({"dtype": torch.float8_e5m2}, r"float8_e5m2.*16 bits"),
    ],
)
def test_wrong_dtypes(arguments, words):
    """The message names the values, and what would be right."""
    with pytest.raises(InvalidRequestError, match=words):
        BlockPool.for_model(model("llama"), num_blocks=2, **arguments)
