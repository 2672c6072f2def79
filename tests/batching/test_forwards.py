"""How a model is executed: which way is chosen, and that no row depends on others."""

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from paged_cache import BlockPool, ContinuousBatcher, UnsupportedModelError
from tests.batching.alone import PAD, alone, prompt, serve

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
ORIGINAL = 16
"""Positions up to which rope is the ordinary one."""

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 64.0}


def with_rope(kind):
    """A fresh tiny model whose rope depends on the length; the same weights each time."""
    torch.manual_seed(0)
    if kind == "dynamic":
        of = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=ORIGINAL, rope_parameters=dict(DYNAMIC)))
    else:
        config, made = {"longrope": (LlamaConfig, LlamaForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}[kind]
        lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": ORIGINAL}
        of = made(config(**SIZES, **lengths, rope_parameters=dict(LONG)))
    of.generation_config.pad_token_id = PAD
    return of.eval()


@functools.cache
def expected(kind, length):
    """What a fresh model, whose rope has seen nothing else, gives for a prompt of this length.

    Phi3 computes all keys anew when it grows beyond the original length; the oldest supported transformers forgets them.
    """
    return alone(with_rope(kind), prompt(length, 1), **GREEDY, use_cache=kind != "phi3")[0]


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "phi3"])
@pytest.mark.parametrize(
    ("lengths", "num_blocks"), [((5, 60, 6, 12, 20, 15), 600), ((11, 15, 13, 12, 20, 14), 16)], ids=["roomy", "tight"]
)
def test_rope_that_depends_on_the_length(kind, lengths, num_blocks):
    """Short rows beside long ones, rows that grow beyond the original length, rows that are computed anew: as alone."""
    options = {**GREEDY, "expected_tokens": 1}  # a forecast that is too low, so that blocks run out
    requests = [(prompt(length, 1), options) for length in lengths]
    outputs, stats = serve(with_rope(kind), requests, num_blocks=num_blocks)
    assert [output.generated_tokens for output in outputs] == [expected(kind, length) for length in lengths]
    assert stats.forward == "single"
    assert (num_blocks < 600) == (stats.num_preemptions > 0)


class Forbidding(LlamaForCausalLM):
    """Gives some tokens the same logit always; a wrong one's logits depend on how many tokens a forward has."""

    forbidden, wrong = float("-inf"), lambda _, logits, num_tokens: logits

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = self.wrong(output.logits, input_ids.shape[1])
        output.logits[..., 100:] = self.forbidden
        return output


def way_of(of):
    """How a batcher executes a model."""
    with ContinuousBatcher(of, BlockPool.for_model(of, num_blocks=20)) as batcher:
        return batcher.stats().forward


@pytest.mark.parametrize("forbidden", [float("-inf"), torch.finfo(torch.float32).min, torch.finfo(torch.float16).min])
def test_forbidden_tokens_in_a_trial(forbidden):
    """They neither demote a model that is right nor hide that one is wrong."""
    of = Forbidding(LlamaConfig(**SIZES)).eval()
    of.forbidden = forbidden
    assert way_of(of) == "packed"
    of.wrong = lambda logits, num_tokens: logits + 5.0 * num_tokens * torch.arange(SIZES["vocab_size"])
    assert way_of(of) == "padded"


def test_other_tokens_are_forbidden_in_a_trial():
    """What one way forbids and another does not is a difference, whatever the other logits are."""
    of = Forbidding(LlamaConfig(**SIZES)).eval()
    few = torch.arange(SIZES["vocab_size"]) < 5
    of.wrong = lambda logits, num_tokens: logits.masked_fill(few & (num_tokens > 5), float("-inf"))
    assert way_of(of) == "padded"


@pytest.mark.parametrize("logit", [float("-inf"), float("nan")])
def test_a_trial_without_a_finite_logit(logit):
    """It shows nothing, so the model is refused."""
    of = Forbidding(LlamaConfig(**SIZES)).eval()
    of.wrong = lambda logits, num_tokens: torch.full_like(logits, logit)
    with pytest.raises(UnsupportedModelError, match="no logits of a trial are finite"):
        way_of(of)
