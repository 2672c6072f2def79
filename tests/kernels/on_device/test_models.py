"""Whole models decode through the Triton kernel, on a GPU or under the interpreter (see test_triton_attention.py)."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import paged_cache
from paged_cache import PagedCache
from paged_cache.kernels.triton import attention
from tests.models import assert_whole, poisoned_pool, prompts

DEVICE = "cpu" if attention.INTERPRETED else "cuda"
pytestmark = [] if attention.INTERPRETED else [pytest.mark.gpu]
GREEDY = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_same_tokens_through_triton(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoding step of a patched model runs on the kernel, and the tokens are those of a DynamicCache."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", "triton")
    calls = []
    kernel = attention._launch
    monkeypatch.setattr(attention, "_launch", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    of = MODELS[kind]().eval().to(DEVICE)
    if kind == "gemma2":
        of.set_attn_implementation("eager")  # sdpa leaves its softcap out
    inputs = {name: x.to(DEVICE) for name, x in prompts((5, 21)).items()}
    pool = poisoned_pool(of)
    expected = of.generate(**inputs, **GREEDY, past_key_values=DynamicCache(config=of.config))
    with paged_cache.patch(of):
        tokens = of.generate(**inputs, **GREEDY, past_key_values=PagedCache(pool))
    assert torch.equal(tokens, expected)
    assert len(calls) == 2 * SMALL["num_hidden_layers"]
    assert_whole(pool)
