"""Whole models decode through the Triton kernel, on a GPU or under the interpreter (see test_triton_attention.py)."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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
GREEDY = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SLIDING = {**SMALL, "sliding_window": 8}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SLIDING)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SLIDING, query_pre_attn_scalar=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SLIDING, num_local_experts=2, num_experts_per_tok=1)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_same_tokens_through_triton(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, and the prompt of a second turn over cached blocks, run on the kernel: the tokens of a DynamicCache."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", "triton")
    q_lens = []
    kernel = attention._launch
    monkeypatch.setattr(attention, "_launch", lambda *a, **k: q_lens.append(a[1].shape[2]) or kernel(*a, **k))
    torch.manual_seed(0)
    of = MODELS[kind]().eval().to(DEVICE)
    if kind == "gemma2":
        of.set_attn_implementation("eager")  # sdpa leaves its softcap out
    pool = poisoned_pool(of)
    expected = two_turns(of, DynamicCache(config=of.config))
    assert not q_lens
    with paged_cache.patch(of), PagedCache(pool) as cache:
        tokens = two_turns(of, cache)
    assert torch.equal(tokens, expected)
    layers = SMALL["num_hidden_layers"]
    assert q_lens.count(1) == 2 * layers
    assert q_lens.count(SECOND + 1) == layers  # and the last token of the first turn, which was only sampled
    assert_whole(pool)


SECOND = 4  # tokens of the second turn


def two_turns(of: torch.nn.Module, cache) -> torch.Tensor:
    """Two tokens, then four more of the user's, then two tokens."""
    inputs = {name: x.to(DEVICE) for name, x in prompts((5, 21)).items()}
    tokens = of.generate(**inputs, **GREEDY, past_key_values=cache)
    more = torch.randint(10, 80, (2, SECOND), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    tokens = torch.cat([tokens, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, inputs["attention_mask"].shape[1] :])], 1)
    return of.generate(tokens, attention_mask=mask, **GREEDY, past_key_values=cache)
