"""Values computed by hand from the published configs of well-known models."""

import functools

import pytest
import torch

from paged_cache.planning import plan
from tests.planning import published
from tests.planning.published import config_of

KIB, GIB = 1024, 1024**3
TIB = 1024**4


@functools.cache
def planned(name, **options):
    """The plan for a published config, in memory enough for all of them."""
    return plan(config_of(getattr(published, name)), **{"memory": 2 * TIB, **options})


@pytest.mark.parametrize(
    ("name", "expected", "formula"),
    [
        ("LLAMA_2_7B", 32 * 2 * 32 * 128 * 2, "32 layers × 2 (K, V) × 32 KV heads × 128 dims × 2 bytes = 512 KiB"),
        ("LLAMA_3_8B", 32 * 2 * 8 * 128 * 2, "32 layers × 2 (K, V) × 8 KV heads × 128 dims × 2 bytes = 128 KiB"),
        (
            "MISTRAL_7B",
            128 * KIB,
            "32 layers of window 4,096 × 2 (K, V) × 8 KV heads × 128 dims × 2 bytes = 128 KiB",
        ),
        ("QWEN_2_5_7B", 28 * 2 * 4 * 128 * 2, "28 layers × 2 (K, V) × 4 KV heads × 128 dims × 2 bytes = 56 KiB"),
        ("GPT_2", 12 * 2 * 12 * 64 * 4, "12 layers × 2 (K, V) × 12 KV heads × 64 dims × 4 bytes = 72 KiB"),
        ("FALCON_7B", 32 * 2 * 1 * 64 * 2, "32 layers × 2 (K, V) × 1 KV head × 64 dims × 2 bytes = 8 KiB"),
        ("DEEPSEEK_V3", 61 * (512 + 64) * 2, "61 layers × (512 latent + 64 rotary dims) × 2 bytes = 68.62 KiB"),
        ("QWEN_3_NEXT_80B", 24 * KIB, "12 layers × 2 (K, V) × 2 KV heads × 256 dims × 2 bytes = 24 KiB"),
    ],
)
def test_bytes_of_a_token(name, expected, formula):
    """One kind of layer: the bytes of a token are those computed by hand, and the formula shows its numbers."""
    made = planned(name)

    assert made.bytes_per_token == expected
    assert made.formulas == (formula,)


@pytest.mark.parametrize(
    ("name", "sliding", "full"),
    [
        ("GEMMA_3_4B", (29, 1024, 29 * 2 * 4 * 256 * 2), (5, None, 5 * 2 * 4 * 256 * 2)),
        ("GEMMA_3_27B", (52, 1024, 52 * 2 * 16 * 128 * 2), (10, None, 10 * 2 * 16 * 128 * 2)),
        ("GPT_OSS_20B", (12, 128, 24 * KIB), (12, None, 24 * KIB)),
    ],
)
def test_layers_with_a_window_are_counted_apart(name, sliding, full):
    """Windows in some layers: each kind has its count, its window and its bytes, also below a `text_config`."""
    made = planned(name)

    assert {(kind.count, kind.window, kind.bytes_per_token) for kind in made.kinds} == {sliding, full}
    assert made.bytes_per_token == sliding[2] + full[2]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("LLAMA_2_7B", 6.738415616),
        ("LLAMA_3_8B", 8.030261248),
        ("MISTRAL_7B", 7.241732096),
        ("QWEN_2_5_7B", 7.615616512),
        ("GPT_2", 0.124439808),  # the output layer is the embedding, and counts once
        ("GEMMA_3_4B", 4.300079472),  # with the part that sees
        ("GPT_OSS_20B", 20.914757184),
        ("DEEPSEEK_V3", 671.026404352),
    ],
)
def test_parameters(name, billions):
    """Parameters are those that the published checkpoints have."""
    assert planned(name).weights.num_parameters == round(billions * 1e9)


def test_weights_take_the_dtype_that_the_config_names():
    """Llama-2-7B in the config's fp16, and in fp32 on demand: weights and K and V both double."""
    half, full = planned("LLAMA_2_7B"), planned("LLAMA_2_7B", dtype="float32")

    assert (half.dtype, full.dtype) == (torch.float16, torch.float32)
    assert half.weights.nbytes == 6738415616 * 2
    assert full.weights.nbytes == 2 * half.weights.nbytes
    assert full.bytes_per_token == 2 * half.bytes_per_token == 1024 * KIB


def test_eight_bits_with_their_scales():
    """Llama-3-8B in int8: half the elements' bytes, and 4 bytes for each head's key and value."""
    made = planned("LLAMA_3_8B", kv_dtype="int8")

    assert made.bytes_per_token == 32 * 2 * 8 * (128 + 4)
    assert made.formulas == (
        "32 layers × 2 (K, V) × 8 KV heads × 128 dims × 1 bytes + 32 × 16 scales × 4 bytes = 66 KiB",
    )
    assert 'kv_dtype="int8"' in made.code


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("LLAMA_2_7B", ""),
        ("LLAMA_3_8B", "GQA: 32 query heads share 8 KV heads, 4 times less than MHA"),
        ("FALCON_7B", "MQA: 71 query heads share 1 KV heads, 71 times less than MHA"),
        ("DEEPSEEK_V3", "not K and V of 128 heads: 71.1 times less"),  # 128 × (128 + 64 + 128) / 576
    ],
)
def test_what_the_kind_of_attention_saves(name, says):
    """GQA, MQA and MLA are compared with heads that have keys and values of their own."""
    (kind,) = planned(name).kinds

    assert kind.comparison.endswith(says) if says else kind.comparison == ""


def test_hybrid_has_states():
    """Qwen3-Next: 36 layers keep a convolution's last 4 inputs of 8192 channels and 32 states of 128 × 128 in fp32."""
    made = planned("QWEN_3_NEXT_80B")

    assert made.states.nbytes == 36 * (8192 * 4 * 2 + 32 * 128 * 128 * 4)
    assert any("36 layers keep states" in note for note in made.notes)


@pytest.mark.parametrize(("name", "gigabytes"), [("GPT_OSS_20B", 13.76), ("DEEPSEEK_V3", 674)])
def test_quantised_checkpoints(name, gigabytes):
    """MXFP4 and FP8 checkpoints take what their files on the hub take: 13.76 GB, and about 674 GB without the MTP layer."""
    assert planned(name).weights.nbytes / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_llama_on_a_card():
    """Llama-3-8B on 24 GiB: blocks, tokens and requests as computed by hand."""
    made = planned("LLAMA_3_8B", memory="24GiB", prompt_len=1000, output_len=201)
    left = 24 * GIB - int(2.4 * GIB) - 2 * 8030261248

    assert made.available == made.pool_memory == left
    assert made.block_nbytes == 16 * 128 * KIB
    assert made.num_blocks == left // (2 * 1024 * KIB)
    assert made.num_tokens == made.num_blocks * 16
    assert made.contiguous.num_requests == left // (8192 * 128 * KIB)
    assert made.padded.num_requests == left // (1200 * 128 * KIB)
    assert made.paged.num_requests == made.num_blocks // 75  # 1200 tokens


def test_windows_bound_what_a_sequence_holds():
    """Mistral-7B at 32,768 tokens: 257 blocks of 16, since a window of 4,096 may begin and end within a block."""
    made = planned("MISTRAL_7B", memory="40GiB")
    last = made.contexts[-1]

    assert last.num_tokens == 32768
    assert last.kv_bytes == 257 * made.block_nbytes
    assert made.contiguous.bytes_per_request == 4096 * 128 * KIB
