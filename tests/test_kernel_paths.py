"""Whole models through every path from the cache to attention: each kernel, and dense tensors. Triton: kernels/on_device."""

import copy
import functools
import importlib
from collections import Counter
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from paged_cache import PagedCache, attention
from paged_cache.kernels import reference
from tests.architectures.runs import NEW_TOKENS, dynamic_cache, run
from tests.architectures.tiny import build
from tests.models import assert_whole, maybe_patched, poisoned_pool, prompts

cpu = pytest.importorskip("paged_cache.kernels.cpu", reason="the CPU kernel needs numba")
Repeat = importlib.import_module("paged_cache.kernels.cpu.attention").Repeat

KINDS = {
    "llama": "llama",
    "mistral": "mistral",  # sliding window
    "gemma2": "gemma2",  # softcap, window in every other layer
    "gemma3": "gemma3_text",  # the same without softcap, two ropes
    "gpt_oss": "gpt_oss",  # sinks
    "gpt2": "gpt2",
    "t5": "s2s:t5",  # bias of the relative position
    "mla": "deepseek_v3",  # expands keys and values behind the cache: dense, whatever is asked for
}
PATHS = ["reference", "cpu", "dense"]
STEPS = NEW_TOKENS - 1  # forwards of one token; the prompt gives the first token


@functools.cache
def tiny(kind):
    """The model, what else its `generate` needs, and its tokens of one and of two turns with a DynamicCache."""
    of, extra = build(KINDS[kind])
    if kind == "gemma2":
        of.set_attn_implementation("eager")  # transformers 5.17 leaves softcap out by default
    return of, extra, {turns: run(of, extra, turns, dynamic_cache(of)) for turns in ("greedy", "second turn")}


class Calls(Counter):
    """Counts, while it is entered, calls of each kernel and whether they bring one query per row or several."""

    def __enter__(self):
        self._patches = [mock.patch.object(x, "paged_attention", self._counting(x)) for x in (reference, cpu)]
        self._patches.append(mock.patch.object(Repeat, "__call__", self._counting_repeats()))
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()

    def _counting(self, module):
        name, kernel = module.__name__.rpartition(".")[2], module.paged_attention

        def paged_attention(query, *args, **kwargs):
            self[name, "one" if query.shape[2] == 1 else "several"] += 1
            return kernel(query, *args, **kwargs)

        return paged_attention

    def _counting_repeats(self):
        repeat = Repeat.__call__

        def again(this, query, *args):
            out = repeat(this, query, *args)
            self["cpu", "one" if query.shape[2] == 1 else "several"] += out is not None
            return out

        return again


@pytest.fixture
def calls(path, monkeypatch):
    """Counts calls with this path's kernel forced."""
    if path != "dense":
        monkeypatch.setenv("PAGED_CACHE_KERNEL", path)
    with Calls() as counter:
        yield counter


def expected_calls(kind, path, **counts):
    """These counts times the number of layers, or none at all."""
    num_layers = tiny(kind)[0].config.get_text_config(decoder=True).num_hidden_layers
    return (
        {} if "dense" in (path, kind) or kind == "mla" else {(path, key): n * num_layers for key, n in counts.items()}
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_turns(kind, path, calls):
    """A padded batch: the prompt goes to the model's own attention, the second question and each token to the kernel."""
    of, extra, tokens = tiny(kind)
    pool = poisoned_pool(of)
    with maybe_patched(of, path != "dense"):
        assert torch.equal(run(of, extra, "second turn", PagedCache(pool)), tokens["second turn"])
    assert calls == expected_calls(kind, path, one=2 * STEPS, several=1)
    assert_whole(pool)


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5"])  # nothing is shared between encoder-decoders
def test_known_prefix(kind, path, calls):
    """A prompt that the pool knows in part: the rest of it runs on the kernel, too."""
    of, extra, tokens = tiny(kind)
    pool = poisoned_pool(of, block_size=8)
    with maybe_patched(of, True):
        run(of, extra, "greedy", PagedCache(pool))
        before, hits = calls.copy(), pool.stats().prefix_hits
        assert torch.equal(run(of, extra, "greedy", PagedCache(pool)), tokens["greedy"])
    assert pool.stats().prefix_hits > hits
    assert calls - before == expected_calls(kind, path, one=STEPS, several=1)
    assert_whole(pool)


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_chunks_of_a_prompt(kind, path, calls):
    """All chunks but the first run on the kernel."""
    of, options = tiny(kind)[0], {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    pool = poisoned_pool(of)
    expected = of.generate(**prompts((7, 23, 32)), **options)
    with maybe_patched(of, True):
        inputs = {**prompts((7, 23, 32)), "past_key_values": PagedCache(pool)}
        assert torch.equal(of.generate(**inputs, **options, prefill_chunk_size=8), expected)
    del inputs
    assert calls == expected_calls(kind, path, one=2, several=3)
    assert_whole(pool)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_layers_of_a_step_share_a_memo(kind, monkeypatch):
    """One per forward and kind of layer: what a kernel plans for the first layer serves the others."""
    of, memos = tiny(kind)[0], []
    kernel = attention.paged_attention
    monkeypatch.setattr(
        attention, "paged_attention", lambda *args, **kwargs: memos.append(kwargs["memo"]) or kernel(*args, **kwargs)
    )
    with maybe_patched(of, True):
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        of.generate(**prompts(), **options, past_key_values=PagedCache(poisoned_pool(of)))
    num_kinds = len(set(getattr(of.config, "layer_types", None) or ["full"]))
    assert len(memos) == 3 * of.config.num_hidden_layers
    assert len({id(memo) for memo in memos}) == 3 * num_kinds


@pytest.fixture
def attention_with_a_factor():
    """An attention implementation, "factor", with an argument of its own: what the output is multiplied by."""

    def attend(module, query, key, value, mask, factor=None, **kwargs):
        output, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return (output if factor is None else output * factor), weights

    AttentionInterface.register("factor", attend)
    AttentionMaskInterface.register("factor", sdpa_mask)
    yield "factor"
    del AttentionInterface._global_mapping["factor"], AttentionMaskInterface._global_mapping["factor"]


@pytest.mark.parametrize("factor", [None, False, 0.5, torch.tensor(2.0)], ids=str)
@pytest.mark.parametrize("path", ["cpu"])
def test_an_argument_that_nobody_knows(factor, calls, attention_with_a_factor):
    """It goes to the model's own attention, with any value but None."""
    of, inputs, logits = copy.deepcopy(tiny("llama")[0]), prompts((5, 9)), []
    of.set_attn_implementation(attention_with_a_factor)
    pool = poisoned_pool(of)
    for cache in (DynamicCache(config=of.config), PagedCache(pool)):
        with maybe_patched(of, isinstance(cache, PagedCache)), torch.no_grad():
            of(**inputs, past_key_values=cache)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
            token = torch.tensor([[11], [12]])
            logits.append(of(token, attention_mask=mask, past_key_values=cache, factor=factor).logits)

    torch.testing.assert_close(*logits)
    assert calls == (expected_calls("llama", "cpu", one=1) if factor is None else {})


@pytest.mark.parametrize("path", ["cpu"])
def test_a_position_bias_under_padding(calls):
    """Columns of the bias are no tokens there: T5 attends to dense tensors, and is right."""
    of = tiny("t5")[0]
    pool, tokens = poisoned_pool(of), []
    ids = torch.randint(10, 80, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for cache in (DynamicCache(), PagedCache(pool)):
        both = EncoderDecoderCache(cache, DynamicCache())
        with maybe_patched(of, isinstance(cache, PagedCache)):
            options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "past_key_values": both}
            tokens.append(of.generate(ids, decoder_input_ids=ids, decoder_attention_mask=mask, **options))
    assert torch.equal(*tokens)
    assert calls == {}
