"""`patch` changes one model, once, and `unpatch` leaves no trace."""

import copy
import gc
import logging

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, PagedCache, UnsupportedModelError, attention, state
from tests.architectures.tiny import build
from tests.models import KINDS, model, poisoned_pool, prompts

GREEDY = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


def trace(of):
    """All that a patch could touch: registries, attributes and hooks of every module, configs."""
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        {
            name: (
                sorted(vars(module)),
                list(module._forward_pre_hooks),
                list(module._forward_hooks),
                list(module._forward_hooks_with_kwargs),
                list(module._forward_pre_hooks_with_kwargs),
                list(module._forward_hooks_always_called),
            )
            for name, module in of.named_modules()
        },
        of.config.to_dict(),
        of.config._attn_implementation,
        of.config.get_text_config(decoder=True)._attn_implementation,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_leaves_no_trace(kind):
    """Registries, module attributes, hooks and configs are as before, also after use and after an error inside."""
    of = copy.deepcopy(model(kind))
    before = trace(of)

    with paged_cache.patch(of):
        assert paged_cache.is_patched(of)
        of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(poisoned_pool(of)))
        assert trace(of) != before
    assert trace(of) == before
    with pytest.raises(ZeroDivisionError), paged_cache.patch(of):
        1 / 0  # noqa: B018
    assert trace(of) == before
    paged_cache.unpatch(of)
    assert trace(of) == before


def test_idempotent():
    """Patching twice is once; an inner `with` does not end an outer patch."""
    of = copy.deepcopy(model("llama"))
    before = trace(of)
    paged_cache.patch(of)
    once = trace(of)
    with paged_cache.patch(of):
        assert trace(of) == once
    assert trace(of) == once
    paged_cache.unpatch(of)
    assert trace(of) == before


def batcher(of):
    """A batcher on a pool of its own."""
    return ContinuousBatcher(of, BlockPool.for_model(of, num_blocks=50, block_size=4))


def forget(batchers):
    """Lets a batcher go without closing it."""
    batchers.pop(0)
    gc.collect()


@pytest.mark.parametrize("end", [lambda batchers: batchers.pop(0).close(), forget], ids=["close", "collect"])
def test_batchers_of_one_model(end):
    """Each keeps the model patched, whichever ends first and however; with the last the model is as before."""
    of = copy.deepcopy(model("llama"))
    before, options = trace(of), {**GREEDY, "progress_bar": False}
    batchers = [batcher(of) for _ in range(3)]
    expected = [output.generated_tokens for output in batchers[0].generate([[5, 6, 7]], **options)]
    while batchers:
        for each in batchers:
            assert [output.generated_tokens for output in each.generate([[5, 6, 7]], **options)] == expected
        assert paged_cache.is_patched(of)
        each = None
        end(batchers)
    assert trace(of) == before


def test_a_batcher_is_made_anew():
    """A name that is given to a new batcher lets the old one go, and the new one works."""
    of = copy.deepcopy(model("llama"))
    for _ in range(3):
        mine = batcher(of)
    gc.collect()
    assert mine.generate([[5, 6, 7]], **GREEDY, progress_bar=False)[0].finish_reason == "length"
    mine.close()
    assert not paged_cache.is_patched(of)


def test_unpatch_while_a_batcher_is_open(caplog):
    """It takes effect when the batcher is closed, and says so; it takes nothing from the batcher."""
    of = copy.deepcopy(model("llama"))
    before = trace(of)
    with batcher(of) as mine, caplog.at_level(logging.INFO, logger="paged_cache"):
        with paged_cache.patch(of):
            pass
        paged_cache.patch(of)
        paged_cache.unpatch(of)
        assert "stays patched" in caplog.text
        assert mine.generate([[5, 6, 7]], **GREEDY, progress_bar=False)[0].error is None
    assert trace(of) == before


@pytest.mark.parametrize("is_first", [True, False])
def test_patch_outlives_a_batcher(is_first):
    """What the user patches, before or after a batcher is made, only `unpatch` takes back."""
    of = copy.deepcopy(model("llama"))
    before = trace(of)
    if is_first:
        paged_cache.patch(of)
    with batcher(of):
        paged_cache.patch(of)
    assert paged_cache.is_patched(of)
    paged_cache.unpatch(of)
    assert trace(of) == before


def test_two_models_and_a_shared_config():
    """Each model is patched for itself, also where two share a config object."""
    a = copy.deepcopy(model("llama"))
    b = type(a)(a.config).eval()
    before = trace(a)
    paged_cache.patch(a)
    paged_cache.patch(b)
    paged_cache.unpatch(a)
    pool = poisoned_pool(b)
    expected = b.generate(**prompts(), **GREEDY)
    assert torch.equal(b.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool)), expected)
    paged_cache.unpatch(b)
    assert trace(a) == before


@pytest.mark.parametrize("kind", KINDS)
def test_patched_model_without_paged_cache(kind):
    """A patched model with another cache, or with none, computes what it did."""
    of = copy.deepcopy(model(kind))
    expected = of.generate(**prompts(), **GREEDY)
    with paged_cache.patch(of):
        assert torch.equal(of.generate(**prompts(), **GREEDY), expected)
        assert torch.equal(of.generate(**prompts(), **GREEDY, past_key_values=DynamicCache(config=of.config)), expected)
        assert torch.equal(of.generate(**prompts(), **GREEDY, use_cache=False), expected)


def test_positional_arguments():
    """A forward called with positional arguments is understood."""
    of, inputs = copy.deepcopy(model("llama")), prompts()
    with paged_cache.patch(of), torch.no_grad():
        cache = PagedCache(poisoned_pool(of))
        logits = of(inputs["input_ids"], inputs["attention_mask"], None, cache).logits
    expected = of(**inputs).logits
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert cache._state.pads == [28, 21, 0]


def test_padding_is_not_stored():
    """Blocks that would hold only padding are never allocated."""
    of = copy.deepcopy(model("llama"))
    pool = poisoned_pool(of)
    with paged_cache.patch(of), torch.no_grad():
        cache = PagedCache(pool)
        of(**prompts((4, 8, 100)), past_key_values=cache)
    assert [len(row[0]) for row in cache.block_tables] == [1, 2, 25]


def test_hint_when_unpatched(caplog):
    """Running unpatched is told once."""
    of = copy.deepcopy(model("llama"))
    pool = poisoned_pool(of)
    state._hint_unpatched.cache_clear()
    with caplog.at_level(logging.INFO, logger="paged_cache"):
        for _ in range(2):
            of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))
    assert sum("patch(model)" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("name", "words"), [("bloom", "write their attention out"), ("deepseek_v3", "latents")])
def test_dense_attention_is_announced(name, words, caplog):
    """Patching a model whose attention never reaches a kernel says so, once, and why; an ordinary model says nothing."""
    of, ordinary = build(name)[0], copy.deepcopy(model("llama"))
    with caplog.at_level(logging.INFO, logger="paged_cache"):
        for each in (of, of, ordinary):
            paged_cache.patch(each)
    paged_cache.unpatch(of)
    paged_cache.unpatch(ordinary)
    (message,) = [record.getMessage() for record in caplog.records if "dense" in record.getMessage()]
    assert type(of).__name__ in message
    assert words in message


def test_reads_of_a_patched_cache_in_unknown_code():
    """Attention that does not know `PagedTensor` gets the dense tensors by any torch operation."""
    of = copy.deepcopy(model("llama"))
    pool = poisoned_pool(of)
    seen = []

    def own_attention(module, query, key, value, mask, scaling, **kwargs):
        seen.append(type(key).__name__)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if mask is not None:
            scores = scores + mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    of.set_attn_implementation("eager")
    expected = of.generate(**prompts(), **GREEDY)
    with paged_cache.patch(of):
        mine = AttentionInterface._global_mapping["paged_cache"]
        AttentionInterface.register("paged_cache", own_attention)
        try:
            tokens = of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))
        finally:
            AttentionInterface.register("paged_cache", mine)
    assert torch.equal(tokens, expected)
    assert "PagedTensor" in seen


COMPILED = {
    "torch.compile(model)": lambda of: torch.compile(of, backend="eager"),
    "model.compile()": lambda of: of.compile(backend="eager") or of,
    "model.forward": lambda of: setattr(of, "forward", torch.compile(of.forward, backend="eager")) or of,
}


@pytest.mark.parametrize(
    ("how", "is_patched_first"), [("torch.compile(model)", False), ("model.compile()", True), ("model.forward", False)]
)
def test_compiled_models(how, is_patched_first, caplog, monkeypatch):
    """The tokens of a compiled model are the same, and its attention still reads blocks in place, once per layer and step."""
    torch._dynamo.reset()
    state._hint_unpatched.cache_clear()
    of, calls = copy.deepcopy(model("llama")), []
    pool = poisoned_pool(of)
    expected = of.generate(**prompts(), **GREEDY)
    kernel = attention.paged_attention
    monkeypatch.setattr(
        attention, "paged_attention", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
    )
    with caplog.at_level(logging.INFO, logger="paged_cache"):
        if is_patched_first:
            paged_cache.patch(of)
        of = COMPILED[how](of)
        paged_cache.patch(of)
        assert torch.equal(of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool)), expected)

    assert len(calls) == 3 * of.config.num_hidden_layers
    assert "patch(model)" not in caplog.text
    with torch.no_grad():  # `generate` of what torch.compile(model) returns runs the model inside
        assert torch.equal(of(**prompts()).logits[:, -1].argmax(-1), expected[:, 33])


def test_what_is_no_model():
    """`unpatch` says what `patch` says, and `is_patched` that it is not."""
    for wrong in ("model", torch.nn.Linear(2, 2), None):
        with pytest.raises(UnsupportedModelError, match=f"{type(wrong).__name__} is no transformers model"):
            paged_cache.unpatch(wrong)
        assert not paged_cache.is_patched(wrong)
