"""`PagedCache` as an object: sharing, blocks coming back, failures, and bad input."""

import copy
import gc
import logging

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache

import paged_cache
from paged_cache import (
    BlockPool,
    InvalidRequestError,
    OutOfBlocksError,
    PagedCache,
    PagedCacheError,
    UnsupportedModelError,
)
from tests.architectures.tiny import build
from tests.models import assert_whole, maybe_patched, model, poisoned_pool, prompts

GREEDY = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
both_ways = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


def used(pool):
    """Blocks that are referenced."""
    return pool.num_blocks - pool.num_free


@both_ways
def test_fork_shares_until_written(patched):
    """A fork takes no block; its first token copies the one block that is partly filled."""
    of, pool = model("llama"), poisoned_pool(model("llama"))
    cache = PagedCache(pool)
    with maybe_patched(of, patched), torch.no_grad():
        of(**prompts((10, 10)), past_key_values=cache)
        before = used(pool)
        forks = cache.fork(3)
        assert [used(pool), len(forks)] == [before, 3]
        copies = pool.stats().cow_copies
        of(torch.tensor([[5], [6]]), past_key_values=forks[0])
    assert pool.stats().cow_copies == copies + 2
    assert used(pool) == before + 2
    assert forks[0].get_seq_length() == 11
    assert cache.get_seq_length() == 10
    del forks
    gc.collect()
    assert used(pool) == before
    cache.release()
    assert_whole(pool)


@both_ways
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3_next", "deepseek_v3"])
def test_deepcopied_prompt_cache(kind, patched):
    """The documented idiom, `copy.deepcopy(prompt_cache)` per question, gives the tokens of separate prompts."""
    of, pool = model(kind), poisoned_pool(model(kind))
    prompt, questions = prompts((17,))["input_ids"], [prompts((n,), seed=n)["input_ids"] for n in (3, 6)]
    cache, dynamic = PagedCache(pool), DynamicCache(config=of.config)
    with maybe_patched(of, patched), torch.no_grad():
        of(prompt, past_key_values=cache)
        of(prompt, past_key_values=dynamic)
        for question in questions:
            ids = torch.cat([prompt, question], 1)
            paged = of.generate(ids, **GREEDY, past_key_values=copy.deepcopy(cache))
            assert torch.equal(paged, of.generate(ids, **GREEDY, past_key_values=copy.deepcopy(dynamic)))
    del cache
    assert_whole(pool)


def test_layers_read_back_what_was_written():
    """`layers[i].keys` and `.values` are what a DynamicCache holds, after reorder, select, repeat and crop."""
    of, pool = model("gemma2"), poisoned_pool(model("gemma2"))
    paged, dynamic = PagedCache(pool), DynamicCache(config=of.config)
    steps = [
        lambda cache: of(prompts((9, 9, 9))["input_ids"], past_key_values=cache),
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: of(torch.tensor([[7], [8], [9]]), past_key_values=cache),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 2])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.activate_past_recording(),
        lambda cache: of(torch.tensor([[7, 3, 4]] * 4), past_key_values=cache),
        lambda cache: cache.crop(-2),
        lambda cache: of(torch.tensor([[11]] * 4), past_key_values=cache),
    ]
    with torch.no_grad():
        for step in steps:
            step(paged)
            step(dynamic)
            pool.check()
            assert paged.get_seq_length() == dynamic.get_seq_length()
            for mine, theirs in zip(paged.layers, dynamic.layers, strict=True):
                assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
                length = mine.keys.shape[2]  # a recording DynamicCache shows more than the next token can see
                torch.testing.assert_close(mine.keys, theirs.keys[:, :, -length:], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(mine.values, theirs.values[:, :, -length:], atol=1e-4, rtol=1e-4)


@both_ways
def test_blocks_behind_the_window_return(patched):
    """A sequence far longer than its sliding window holds the blocks of the window only."""
    of = model("mistral")
    pool = poisoned_pool(of, num_blocks=40, prefix_caching=False)
    cache = PagedCache(pool)
    with maybe_patched(of, patched):
        of.generate(prompts((20,))["input_ids"], **GREEDY | {"max_new_tokens": 200}, past_key_values=cache)
    groups = len(cache.block_tables[0])
    assert used(pool) <= groups * (of.config.sliding_window // pool.block_size + 2)
    cache.release()
    assert_whole(pool)


@both_ways
def test_blocks_come_back(patched):
    """Released, left its `with` block, deleted or collected in a cycle: the pool is whole again."""
    of, pool = model("llama"), poisoned_pool(model("llama"))
    with maybe_patched(of, patched):
        cache = PagedCache(pool)
        of.generate(**prompts(), **GREEDY, past_key_values=cache)
        cache.release()
        cache.release()
        assert used(pool) == 0
        with PagedCache(pool) as cache:
            of.generate(**prompts(), **GREEDY, past_key_values=cache)
            assert used(pool) > 0
        assert used(pool) == 0
        cache = PagedCache(pool)
        of.generate(**prompts(), **GREEDY, past_key_values=cache)
        del cache
        assert used(pool) == 0
        cycle = [PagedCache(pool)]
        cycle.append(cycle)
        of.generate(**prompts(), **GREEDY, past_key_values=cycle[0])
        del cycle
        assert_whole(pool)
        cache = PagedCache(pool)
        tokens = of.generate(**prompts(), **GREEDY, past_key_values=cache)
        cache.reset()
        assert used(pool) == 0
        assert torch.equal(of.generate(**prompts(), **GREEDY, past_key_values=cache), tokens)


def resume(of, cache, expected, done):
    """Goes on behind the columns that the cache holds, with the tokens that were generated so far."""
    inputs = prompts()
    width = max(done + 1, inputs["input_ids"].shape[1])
    new = width - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(expected), new, dtype=torch.long)], dim=1)
    rest = GREEDY | {"max_new_tokens": expected.shape[1] - width}
    return of.generate(expected[:, :width], attention_mask=mask, **rest, past_key_values=cache)


@both_ways
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_in_any_forward(kind, error, patched):
    """Whichever layer call fails, by an error or Ctrl-C: nothing leaks, and a patched model can go on with the cache."""
    of, pool = copy.deepcopy(model(kind)), poisoned_pool(model(kind))
    pool._model = None  # the copy stands for the model
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == fail_at:
            raise error("injected")

    layers = [m for name, m in of.named_modules() if name.endswith("mlp")]
    for layer in layers:
        layer.register_forward_pre_hook(fail)
    fail_at = 0  # read by the hook
    expected = of.generate(**prompts(), **GREEDY, past_key_values=DynamicCache(config=of.config))
    total = len(calls)
    with maybe_patched(of, patched):
        for fail_at in range(1, total + 1):
            calls.clear()
            pool.clear_prefix_cache()
            cache = PagedCache(pool)
            with pytest.raises(error, match="injected"):
                of.generate(**prompts(), **GREEDY, past_key_values=cache)
            pool.check()
            if patched:
                done = cache.fork().get_seq_length()
                assert done == (0 if fail_at <= len(layers) else 33 + (fail_at - 1) // len(layers) - 1)
                resumed = resume(of, cache, expected, done)
                assert torch.equal(resumed, expected)
            del cache
            assert_whole(pool)


@both_ways
def test_out_of_blocks_at_any_step(patched):
    """A pool that is too small fails with a clear error at whatever step, leaks nothing and serves the next request."""
    of = model("gemma2")
    needed_at, caught = [], []
    for num_blocks in range(1, 60, 3):
        pool = poisoned_pool(of, num_blocks=num_blocks)
        with maybe_patched(of, patched):
            try:
                of.generate(**prompts((9, 12)), **GREEDY, past_key_values=PagedCache(pool))
            except OutOfBlocksError as error:
                caught.append((error.needed, error.free, str(error)))
                needed_at.append(num_blocks)
        assert_whole(pool)
    assert needed_at == list(range(1, 60, 3))[: len(needed_at)]
    assert 5 < needed_at[-1] < 50
    assert all(needed > free >= 0 and str(needed) in message for needed, free, message in caught)


@both_ways
def test_inside_an_encoder_decoder_cache(patched):
    """Encoder-decoder models keep their decoder's K and V in the pool, assisted decoding included."""
    of, _ = build("s2s:bart")
    inputs = {"input_ids": prompts((9,))["input_ids"], **GREEDY, "decoder_start_token_id": 2}
    pool = poisoned_pool(of)
    for mode in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        config = of.config.get_text_config(decoder=True)
        pairs = [
            EncoderDecoderCache(cache, DynamicCache(config=config))
            for cache in (DynamicCache(config=config), PagedCache(pool))
        ]
        with maybe_patched(of, patched):
            dynamic, paged = (of.generate(**inputs, **mode, past_key_values=pair) for pair in pairs)
        assert torch.equal(dynamic, paged)
        del pairs
        assert_whole(pool)


def test_is_a_cache():
    """Code that asks for transformers' classes gets them."""
    cache = PagedCache(poisoned_pool(model("llama")))
    assert isinstance(cache, Cache)
    assert isinstance(cache, DynamicCache)
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.get_max_length() == -1
    assert cache.get_seq_length() == 0
    assert len(cache) == model("llama").config.num_hidden_layers
    assert "PagedCache" in repr(cache)


@both_ways
def test_gradients_of_a_step(patched):
    """A step with gradients works; earlier tokens are constants, and the pool holds no graph."""
    of, pool = model("llama"), poisoned_pool(model("llama"))
    cache = PagedCache(pool)
    with maybe_patched(of, patched):
        of(prompts((9,))["input_ids"], past_key_values=cache)
        of(torch.tensor([[4, 5]]), past_key_values=cache).logits.sum().backward()
    assert all(not blocks.keys.requires_grad for blocks in pool.storage.layers.values())
    of.zero_grad()


# Bad input: a clear error each, nothing changed.


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "exactly one"),
        ({"num_blocks": 4, "memory": "1GiB"}, "exactly one"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": -3}, "num_blocks is -3"),
        ({"num_blocks": 2.5}, "2.5"),
        ({"num_blocks": 4, "block_size": 12}, "power of two"),
        ({"memory": "2 gigs"}, "2 gigs"),
        ({"memory": 1.5}, "1.5"),
        ({"memory": 100}, "one block alone takes"),
        ({"memory": -5}, "-5"),
    ],
)
def test_bad_pool_arguments(kwargs, words):
    """The message names the value and what would be right."""
    with pytest.raises(InvalidRequestError, match=words):
        BlockPool.for_model(model("llama"), **kwargs)


@pytest.mark.parametrize(
    ("memory", "nbytes"), [("1MiB", 2**20), ("1.5 MB", 1_500_000), (2**20, 2**20), ("4096k", 4_096_000)]
)
def test_memory_makes_blocks(memory, nbytes):
    """Blocks fill the given memory and not a byte more."""
    pool = BlockPool.for_model(model("llama"), memory=memory)
    per_block = pool.nbytes // pool.num_blocks
    assert nbytes - per_block < pool.nbytes <= nbytes
    assert per_block == pool.bytes_per_token * pool.block_size


def test_share_of_free_memory():
    """A float is a share of the free memory."""
    pool = BlockPool.for_model(model("llama"), memory=0.001)
    assert pool.nbytes > 0


def test_one_log_line(caplog):
    """`for_model` says what it made: blocks, tokens, KiB, bytes per token."""
    with caplog.at_level(logging.INFO, logger="paged_cache"):
        pool = BlockPool.for_model(model("llama"), num_blocks=12)
    (line,) = [record.getMessage() for record in caplog.records]
    for part in ("12 blocks", "192 tokens", "KiB", f"{pool.bytes_per_token} bytes per token"):
        assert part in line


def test_not_a_model():
    """Neither a pool nor a patch for what is no transformers model."""
    for make in (lambda m: BlockPool.for_model(m, num_blocks=1), paged_cache.patch):
        with pytest.raises(UnsupportedModelError, match="Linear"):
            make(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidRequestError, match="BlockPool"):
        PagedCache(model("llama"))


def test_right_padding():
    """Padding on the right is refused before anything runs, by `generate` and by `for_prompt`."""
    of, pool = model("llama"), poisoned_pool(model("llama"))
    inputs = {name: x.flip(1) for name, x in prompts((4, 9)).items()}
    with paged_cache.patch(of), pytest.raises(InvalidRequestError, match=r"row 0 .*padding_side"):
        of.generate(**inputs, **GREEDY, past_key_values=PagedCache(pool))
    with pytest.raises(InvalidRequestError, match="row 0"):
        PagedCache.for_prompt(pool, **inputs)
    assert_whole(pool)


def test_wrong_dtype():
    """A pool of another dtype than the model's keys."""
    of = model("llama")
    pool = BlockPool.for_model(of, num_blocks=20, dtype=torch.bfloat16)
    with pytest.raises(InvalidRequestError, match=r"torch.float32.*torch.bfloat16"):
        of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))
    assert_whole(pool)


def test_wrong_device():
    """A pool on another device than the model."""
    of = model("llama")
    pool = BlockPool.for_model(copy.deepcopy(of).to("meta"), num_blocks=20)
    with pytest.raises(InvalidRequestError, match="meta"):
        of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))


@both_ways
def test_another_models_pool(patched):
    """A pool made for one model and a forward of another."""
    pool, other = poisoned_pool(model("llama")), model("gpt2")
    with maybe_patched(other, patched):
        model("llama").generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))
        with pytest.raises((InvalidRequestError, UnsupportedModelError), match=r"BlockPool.for_model|layer"):
            other.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))
    assert_whole(pool)


def test_one_cache_for_two_models():
    """A cache that a model has filled is refused by another of the same shape."""
    of, other = model("llama"), copy.deepcopy(model("llama"))
    pool = poisoned_pool(of)
    cache = PagedCache(pool)
    with paged_cache.patch(of), paged_cache.patch(other), torch.no_grad():
        of(prompts((9,))["input_ids"], past_key_values=cache)
        length = cache.get_seq_length()
        with pytest.raises(InvalidRequestError, match="another model"):
            other(torch.tensor([[5]]), past_key_values=cache)
        assert cache.get_seq_length() == length


@both_ways
def test_released_cache(patched):
    """A released cache says so."""
    of, pool = model("llama"), poisoned_pool(model("llama"))
    cache = PagedCache(pool)
    cache.release()
    with maybe_patched(of, patched), pytest.raises(PagedCacheError, match="released"):
        of.generate(**prompts(), **GREEDY, past_key_values=cache)


@both_ways
def test_wrong_number_of_rows(patched):
    """A filled cache and another batch size."""
    of, pool = model("llama"), poisoned_pool(model("llama"))
    cache = PagedCache(pool)
    with maybe_patched(of, patched), torch.no_grad():
        of(prompts((9, 9))["input_ids"], past_key_values=cache)
        with pytest.raises(InvalidRequestError, match=r"3 rows.*holds 2"):
            of(torch.tensor([[5], [5], [5]]), past_key_values=cache)
        with pytest.raises(InvalidRequestError, match="row 7"):
            cache.reorder_cache(torch.tensor([0, 7]))
    assert cache.get_seq_length() == 9
    pool.check()


def test_crop_refusals():
    """A positive number, and a window that has moved past."""
    of, pool = model("mistral"), poisoned_pool(model("mistral"))
    cache = PagedCache(pool)
    with torch.no_grad():
        of(prompts((40,))["input_ids"], past_key_values=cache)
        of(torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-20)
    assert cache.get_seq_length() == 41
    pool.check()
