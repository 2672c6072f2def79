"""`model.generate` gives the same tokens with a `PagedCache` as with a `DynamicCache`, in every mode it has."""

import copy
import functools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import paged_cache
from paged_cache import PagedCache
from paged_cache.assets import MODEL_PATH
from tests.models import KINDS, assert_whole, maybe_patched, model, poisoned_pool, prompts

ALWAYS = {"max_new_tokens": 14, "pad_token_id": 0, "eos_token_id": None, "do_sample": False, "repetition_penalty": 1.5}
NO_ROLLBACK = {"qwen3_next": "states of linear attention cannot be rolled back"}


class OnlyEven(LogitsProcessor):
    """A user's own processor."""

    def __call__(self, input_ids, scores):
        scores[:, 1::2] = -float("inf")
        return scores


class StopAfter(StoppingCriteria):
    """A user's own criterion, by length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 40)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "prefill in chunks": {"prefill_chunk_size": 7},
    "eos": {"eos_token_id": list(range(20, 50))},
    "processors": {"logits_processor": LogitsProcessorList([OnlyEven()]), "no_repeat_ngram_size": 2, "min_p": 0.1},
    "criteria": {"stopping_criteria": StoppingCriteriaList([StopAfter()])},
    "constrained": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(11, 60, 3))},
}


@functools.lru_cache(maxsize=1)
def with_attention(kind, implementation):
    """A copy of the model that computes attention so."""
    of = copy.deepcopy(model(kind))
    of.set_attn_implementation(implementation)
    return of


@functools.lru_cache(maxsize=1)
def reference(kind, implementation, mode):
    """What `generate` gives with a `DynamicCache`: once for the plain and the patched model, which follow each other."""
    of = copy.deepcopy(model(kind))  # its own: nothing that we did to another one counts
    of.set_attn_implementation(implementation)
    return with_dynamic_cache(of, prompts(), **MODES[mode])


def with_dynamic_cache(of, inputs, **mode):
    """What `generate` gives with transformers' own cache."""
    torch.manual_seed(3)
    return of.generate(**inputs, **ALWAYS | mode, past_key_values=DynamicCache(config=of.config))


def both(of, inputs, patched, **mode):
    """What `generate` gives with a `DynamicCache` and with a `PagedCache`, whose pool is whole after it."""
    return with_dynamic_cache(of, inputs, **mode), with_paged_cache(of, inputs, patched, **mode)


def with_paged_cache(of, inputs, patched, **mode):
    """What `generate` gives with a `PagedCache`, whose pool is whole after it."""
    pool = poisoned_pool(of)
    with maybe_patched(of, patched):
        torch.manual_seed(3)
        actual = of.generate(**inputs, **ALWAYS | mode, past_key_values=PagedCache(pool))
    if isinstance(actual, torch.Tensor):
        assert_whole(pool)
    return actual


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_modes(kind, mode, implementation, patched):
    """Every decoding mode, batched and padded on the left."""
    if implementation == "sdpa" and not model(kind)._supports_sdpa:
        pytest.skip(f"{kind} has no sdpa attention")

    expected = reference(kind, implementation, mode)
    actual = with_paged_cache(with_attention(kind, implementation), prompts(), patched, **MODES[mode])

    assert torch.equal(expected, actual)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single_rows(kind, patched):
    """The golden rule: each row of a padded batch equals its prompt alone, without padding, on a DynamicCache."""
    of, inputs = model(kind), prompts()
    pool = poisoned_pool(of)
    plain = ALWAYS | {"repetition_penalty": 1.0}  # transformers 5.17 also counts padding as repeated

    with maybe_patched(of, patched):
        batch = of.generate(**inputs, **plain, past_key_values=PagedCache(pool))

    for row, ids, mask in zip(batch, inputs["input_ids"], inputs["attention_mask"], strict=True):
        alone = of.generate(ids[mask.bool()][None], **plain, past_key_values=DynamicCache(config=of.config))
        assert torch.equal(alone[0, mask.sum() :], row[ids.shape[0] :])
    assert_whole(pool)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NO_ROLLBACK])
@pytest.mark.parametrize("mode", ["prompt lookup", "assistant", "assistant sampling"])
def test_assisted_decoding(kind, mode, patched):
    """Drafted tokens are rolled back: prompt lookup, and a smaller model as assistant."""
    of, inputs = model(kind), {"input_ids": prompts((24,))["input_ids"].repeat(1, 2)}
    mode = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": model("llama")},
        "assistant sampling": {"assistant_model": model("llama"), "do_sample": True},
    }[mode]

    expected, actual = both(of, inputs, patched, **mode)

    assert torch.equal(expected, actual)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("kind", KINDS)
def test_conversation(kind, patched):
    """Three turns on one cache equal three turns on a DynamicCache, and a fork taken in between continues the same."""
    of, inputs = model(kind), prompts((6, 11))
    pool = poisoned_pool(of)
    caches = {"dynamic": DynamicCache(config=of.config), "paged": PagedCache(pool)}
    tokens = {}

    with maybe_patched(of, patched):
        for name, cache in caches.items():
            turn, fork = dict(inputs), None
            for _ in range(3):
                fork = copy.deepcopy(cache)
                tokens[name] = of.generate(**turn, **ALWAYS, past_key_values=cache)
                tokens[f"{name} fork"] = of.generate(**turn, **ALWAYS, past_key_values=fork)
                new = torch.randint(10, 80, (2, 3), generator=torch.Generator().manual_seed(5))
                turn["input_ids"] = torch.cat([tokens[name], new], dim=1)
                ones = turn["attention_mask"].new_ones(2, turn["input_ids"].shape[1] - turn["attention_mask"].shape[1])
                turn["attention_mask"] = torch.cat([turn["attention_mask"], ones], dim=1)

    assert torch.equal(tokens["paged"], tokens["dynamic"])
    assert torch.equal(tokens["paged fork"], tokens["dynamic"])
    del caches, cache, fork
    assert_whole(pool)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_next"])
def test_inputs_embeds(kind, patched):
    """Prompts given as embeddings."""
    of, inputs = model(kind), prompts()
    embeds = of.get_input_embeddings()(inputs.pop("input_ids")).detach()

    expected, actual = both(of, inputs | {"inputs_embeds": embeds}, patched)

    assert torch.equal(expected, actual)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_outputs_besides_tokens(patched):
    """Scores, logits, hidden states and attentions are those of a DynamicCache, and the cache itself is returned."""
    of, inputs = copy.deepcopy(model("gemma2")), prompts()
    of.set_attn_implementation("eager")
    wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}

    expected, actual = both(of, inputs, patched, **wanted, return_dict_in_generate=True)

    assert torch.equal(expected.sequences, actual.sequences)
    assert isinstance(actual.past_key_values, PagedCache)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), atol=1e-4, rtol=1e-4)
    assert len(actual.attentions) == len(expected.attentions) == ALWAYS["max_new_tokens"]
    for step_actual, step_expected in zip(actual.attentions[1:], expected.attentions[1:], strict=True):
        for x, y in zip(step_actual, step_expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    for x, y in zip(actual.hidden_states[-1], expected.hidden_states[-1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_streamer():
    """A streamer gets the tokens one by one."""

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    of, inputs, streamer = model("llama"), prompts((9,)), Collect()
    with paged_cache.patch(of):
        tokens = of.generate(**inputs, **ALWAYS, streamer=streamer, past_key_values=PagedCache(poisoned_pool(of)))

    assert streamer.ended
    assert streamer.tokens == tokens[0].tolist()


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_under_inference_mode(dtype, patched):
    """Half precision and inference mode: the first tokens agree (later ones may differ in the last bits' ties)."""
    of = copy.deepcopy(model("llama")).to(dtype)
    with torch.inference_mode():
        expected, actual = both(of, prompts(), patched, max_new_tokens=4 if dtype != torch.float32 else 14)

    assert torch.equal(expected, actual)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_plain_forward_returns_all_logits(patched):
    """A forward without `logits_to_keep` computes every token, also where the pool holds them already."""
    of, inputs = model("llama"), prompts((20, 20))
    pool = poisoned_pool(of)
    expected = of(**inputs).logits

    with maybe_patched(of, patched), torch.no_grad():
        first = of(**inputs, past_key_values=PagedCache(pool)).logits
        second = of(**inputs, past_key_values=PagedCache(pool)).logits

    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second, expected, atol=1e-4, rtol=1e-4)


def test_kernel_really_runs(monkeypatch):
    """Decoding on a patched model goes to the kernel once per layer and step, with no dense gather."""
    from paged_cache import attention, step

    of, calls, gathers = model("mistral"), [], []
    kernel, gather = attention.paged_attention, step.KVStorage.gather
    monkeypatch.setattr(attention, "paged_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    monkeypatch.setattr(step.KVStorage, "gather", lambda *a: gathers.append(1) or gather(*a))

    with paged_cache.patch(of):
        of.generate(**prompts(), **ALWAYS, past_key_values=PagedCache(poisoned_pool(of)))

    assert len(calls) == (ALWAYS["max_new_tokens"] - 1) * of.config.num_hidden_layers
    assert not gathers


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_stop_strings(patched):
    """Stop strings, with the tokenizer and the trained model that the package carries."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    of = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    inputs = tokenizer(["def read_lines(path):\n", "class Stack:\n    def"], padding=True, return_tensors="pt")
    mode = {"stop_strings": ["return", "\n\n"], "tokenizer": tokenizer, "max_new_tokens": 60, "do_sample": False}

    expected = of.generate(**inputs, **mode, past_key_values=DynamicCache(config=of.config))
    with maybe_patched(of, patched):
        actual = of.generate(**inputs, **mode, past_key_values=PagedCache(poisoned_pool(of)))

    assert torch.equal(expected, actual)
    assert (actual[:, -1] == tokenizer.pad_token_id).any()  # a row that was stopped waits for the other
