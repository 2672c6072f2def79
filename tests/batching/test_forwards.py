"""How a model is executed: which way is chosen, and that no row depends on others."""

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

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
    """What a fresh model, whose rope has seen nothing else, gives for a prompt of this length."""
    return alone(with_rope(kind), prompt(length, 1), **GREEDY)[0]


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
