"""Each request gets the tokens that `generate` gives for it alone, whatever else is in the batch."""

import copy
import functools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tests.batching.alone import alone, differences, prompt, run_alone, serve, tiny

LENGTHS, NEW = (5, 12, 33, 7, 20, 41, 3), (10, 3, 17, 1, 25, 8, 30)
GREEDY = {"do_sample": False, "eos_token_id": None, "repetition_penalty": 10.0}
SAMPLE = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 12, "top_k": 0}
BEAMS = {"num_beams": 3, "do_sample": False, "eos_token_id": list(range(100, 112)), "max_new_tokens": 10}
ANY_EOS = list(range(60, 100))

WAYS = {
    "llama": "packed",
    "gpt2": "packed",
    "gemma2": "packed",
    "mistral": "packed",
    "qwen3_next": "padded",
    "deepseek_v3": "padded",
    "deepseek_v4": "single",
}
"""How each kind of model is executed."""

POOLS = {
    "one token at a time": {"block_size": 1, "max_num_batched_tokens": 1, "max_num_seqs": 8, "num_blocks": 600},
    "small chunks": {"block_size": 4, "max_num_batched_tokens": 5, "max_num_seqs": 3},
    "chunks": {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "whole prompts": {"block_size": 16, "max_num_batched_tokens": 512, "max_num_seqs": 8},
    "nothing shared": {"block_size": 8, "max_num_batched_tokens": 32, "max_num_seqs": 8, "prefix_caching": False},
}


class Steer(LogitsProcessor):
    """A user's processor: what it does depends on all tokens so far."""

    def __call__(self, input_ids, scores):
        favoured = (input_ids.sum(-1, keepdim=True) * 7 + input_ids.shape[1]) % scores.shape[1]
        return scores.scatter_add(1, favoured, torch.full_like(scores[:, :1], 5.0))


class MultipleFound(StoppingCriteria):
    """A user's criterion: rows stop by themselves."""

    def __init__(self, modulus):
        self.modulus = modulus

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % self.modulus == 0


def only_even(batch_id, input_ids):
    """Every other token after each odd number of them."""
    return list(range(len(input_ids) % 2, 128, 2))


OPTIONS = {
    "greedy": {**GREEDY, "max_new_tokens": 20},
    "greedy to a token": {"do_sample": False, "eos_token_id": ANY_EOS, "max_new_tokens": 30},
    "sampling": SAMPLE,
    "temperature": {**SAMPLE, "temperature": 0.6},
    "another temperature": {**SAMPLE, "temperature": 1.7},
    "top_k": {**SAMPLE, "top_k": 9},
    "top_p": {**SAMPLE, "top_p": 0.7, "temperature": 0.9},
    "min_p": {**SAMPLE, "min_p": 0.05},
    "typical_p": {**SAMPLE, "typical_p": 0.5},
    "cutoffs": {**SAMPLE, "epsilon_cutoff": 0.001, "eta_cutoff": 0.002},
    "several samples": {**SAMPLE, "num_return_sequences": 3, "eos_token_id": ANY_EOS, "max_new_tokens": 20},
    "several steered samples": {**SAMPLE, "num_return_sequences": 2, "repetition_penalty": 3.0},
    "beams": BEAMS,
    "all beams": {**BEAMS, "num_return_sequences": 3},
    "sampled beams": {**BEAMS, "do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "short beams": {**BEAMS, "length_penalty": -2.0, "eos_token_id": ANY_EOS},
    "long beams": {**BEAMS, "length_penalty": 3.0, "early_stopping": "never", "num_return_sequences": 2},
    "early beams": {**BEAMS, "early_stopping": True, "eos_token_id": ANY_EOS, "num_return_sequences": 3},
    "penalised beams": {**BEAMS, "repetition_penalty": 4.0, "no_repeat_ngram_size": 2},
    "no_repeat_ngram_size": {"do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 2, "max_new_tokens": 25},
    "bad_words_ids": {**GREEDY, "bad_words_ids": [[7], [8, 9], [30], [40]], "max_new_tokens": 15},
    "min_new_tokens": {**GREEDY, "eos_token_id": ANY_EOS, "min_new_tokens": 9, "max_new_tokens": 20},
    "min_length": {**GREEDY, "eos_token_id": ANY_EOS, "min_length": 20, "max_new_tokens": 30},
    "suppress_tokens": {**GREEDY, "suppress_tokens": list(range(0, 128, 3)), "max_new_tokens": 12},
    "begin_suppress_tokens": {**GREEDY, "begin_suppress_tokens": list(range(1, 128, 2)), "max_new_tokens": 6},
    "forced_eos_token_id": {**GREEDY, "forced_eos_token_id": 99, "max_new_tokens": 7},
    "exponential_decay": {
        **GREEDY,
        "eos_token_id": ANY_EOS,
        "exponential_decay_length_penalty": (3, 1.5),
        "max_new_tokens": 30,
    },
    "sequence_bias": {**GREEDY, "sequence_bias": [[[11], 4.0], [[12, 13], 9.0]], "max_new_tokens": 12},
    "guidance_scale": {**GREEDY, "guidance_scale": 1.7, "max_new_tokens": 9},
    "encoder penalties": {**GREEDY, "encoder_repetition_penalty": 2.0, "max_new_tokens": 9},
    "renormalize_logits": {**SAMPLE, "renormalize_logits": True, "temperature": 0.8, "top_p": 0.8},
    "remove_invalid_values": {**SAMPLE, "remove_invalid_values": True},
    "prefix_allowed_tokens_fn": {**GREEDY, "prefix_allowed_tokens_fn": only_even, "max_new_tokens": 12},
    "own processor": {**GREEDY, "logits_processor": LogitsProcessorList([Steer()]), "max_new_tokens": 15},
    "own processor and samples": {
        **SAMPLE,
        "logits_processor": LogitsProcessorList([Steer()]),
        "num_return_sequences": 2,
    },
    "own criterion": {
        **GREEDY,
        "stopping_criteria": StoppingCriteriaList([MultipleFound(5)]),
        "max_new_tokens": 40,
    },
    "own criterion and samples": {
        **SAMPLE,
        "eos_token_id": [127],  # without one generate goes on behind a sequence's end
        "stopping_criteria": StoppingCriteriaList([MultipleFound(9)]),
        "num_return_sequences": 3,
        "max_new_tokens": 25,
    },
    "max_length": {**GREEDY, "max_length": 60},
    "max_time": {**GREEDY, "max_time": 1e6, "max_new_tokens": 5},
    "one token": {**GREEDY, "max_new_tokens": 1},
}
"""Requests that share one batch, each with its own options."""


def mixed_requests(names=tuple(OPTIONS)):
    """A prompt of its own for each set of options; half of them begin alike."""
    common = prompt(13, seed=9)
    return [
        (common * (i % 2) + prompt(3 + 5 * i % 17, seed=i), {**OPTIONS[name], "seed": 100 + i})
        for i, name in enumerate(names)
    ]


def without_cache(kind, options):
    """Up to transformers 5.17 beams of deepseek_v4 keep each other's compressed keys, with transformers' own cache."""
    return {"use_cache": False} if kind == "deepseek_v4" and "num_beams" in options else {}


GREEDY_REQUESTS = [(prompt(n), {**GREEDY, "max_new_tokens": new}) for n, new in zip(LENGTHS, NEW, strict=True)]


@functools.lru_cache(maxsize=1)
def greedy_alone(kind):
    """What each prompt gets alone, in tests that follow each other."""
    return [alone(tiny(kind), ids, **options) for ids, options in GREEDY_REQUESTS]


@functools.lru_cache(maxsize=1)
def mixed_alone(kind):
    """The same with each set of options."""
    requests = [(ids, copy.deepcopy(options) | without_cache(kind, options)) for ids, options in mixed_requests()]
    return [alone(tiny(kind), ids, **options) for ids, options in requests]


@pytest.mark.parametrize("setting", POOLS)
@pytest.mark.parametrize("kind", WAYS)
def test_greedy(kind, setting):
    """Greedy tokens do not depend on chunks, blocks, prefixes or neighbours."""
    outputs, stats = serve(tiny(kind), GREEDY_REQUESTS, **POOLS[setting])
    assert not differences(outputs, greedy_alone(kind))
    assert stats.forward == WAYS[kind]
    assert [output.finish_reason for output in outputs] == ["length"] * len(NEW)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [("llama", setting) for setting in POOLS] + [(kind, "chunks") for kind in WAYS if kind != "llama"],
)
def test_options_mixed_in_one_batch(kind, setting):
    """Processors, samplers, beams and stopping criteria are each request's own."""
    outputs, _ = serve(tiny(kind), mixed_requests(), **POOLS[setting])
    names = list(OPTIONS)
    assert not {names[i]: rows for i, rows in differences(outputs, mixed_alone(kind)).items()}


def test_preemption_changes_no_token():
    """Requests that lose their blocks, beams and samples among them, go on as if nothing had been."""
    of = tiny("llama")
    names = [name for name in OPTIONS if "time" not in name]
    requests = [(ids, options | {"expected_tokens": 1}) for ids, options in mixed_requests(names)]
    expected = [alone(of, ids, **options) for ids, options in requests]
    outputs, stats = serve(of, requests, num_blocks=30, max_num_batched_tokens=16, max_num_seqs=32)
    assert not {names[i]: rows for i, rows in differences(outputs, expected).items()}
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mistral", "qwen3_next", "deepseek_v3", "deepseek_v4"])
def test_preemption_of_any_kind_of_model(kind):
    """States, windows and latents that were lost are computed again."""
    of = tiny(kind)
    requests = [(prompt(n), {**GREEDY, "max_new_tokens": 25, "expected_tokens": 1}) for n in (3, 2, 4, 9, 1, 5, 6, 7)]
    expected = [alone(of, ids, **options) for ids, options in requests]
    num_blocks = {"gemma2": 24, "mistral": 10, "deepseek_v4": 10}.get(kind, 20)
    outputs, stats = serve(of, requests, num_blocks=num_blocks, max_num_batched_tokens=64)
    assert not differences(outputs, expected)
    assert stats.num_preemptions > 0


KEPT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("name", ["greedy to a token", "top_p", "several samples", "own processor", "all beams"])
def test_scores_and_logits(name):
    """`output_scores` and `output_logits` are those of `generate`, for each token of each sequence."""
    of = tiny("llama")
    requests = [(prompt(n), {**OPTIONS[name], **KEPT, "seed": n}) for n in (4, 11, 18)]
    expected = [run_alone(of, ids, **options) for ids, options in requests]
    outputs, _ = serve(of, requests, max_num_batched_tokens=9)
    for (ids, _), output, want in zip(requests, outputs, expected, strict=True):
        assert not differences([output], [want.sequences[:, len(ids) :].tolist()])
        assert len(output.scores) == len(want.scores)
        assert len(output.logits) == len(want.logits)
        for k in range(len(want.scores)):
            rows = [i for i, row in enumerate(output.sequences) if len(row) > k or "beams" in name]
            torch.testing.assert_close(output.scores[k][rows], want.scores[k][rows], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.logits[k][rows], want.logits[k][rows], rtol=1e-4, atol=1e-4)
        if "beams" in name:
            torch.testing.assert_close(output.sequences_scores, want.sequences_scores)


def test_nothing_is_kept_unasked():
    """Scores and logits take memory and are there on request only."""
    ((output,), _) = serve(tiny("llama"), [(prompt(5), {**GREEDY, "max_new_tokens": 3})])
    assert output.scores is None
    assert output.logits is None
    assert output.sequences_scores is None


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_next"])
def test_bfloat16(kind):
    """In 16 bits, too, the first logits are the model's and all requests end."""
    of = copy.deepcopy(tiny(kind)).bfloat16()
    requests = [(prompt(n), {**GREEDY, **KEPT, "max_new_tokens": 12}) for n in LENGTHS]
    expected = [run_alone(of, ids, **options) for ids, options in requests]
    outputs, _ = serve(of, requests, max_num_batched_tokens=16)
    for output, want in zip(outputs, expected, strict=True):
        assert len(output.generated_tokens) == 12
        difference = (output.logits[0] - want.logits[0]).abs().max() / want.logits[0].abs().max()
        assert difference < 0.05
