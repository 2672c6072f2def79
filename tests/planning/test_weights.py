"""Bits of quantised weights, and which weights have them."""

import pytest
import torch
from transformers import LlamaConfig

from paged_cache.planning import plan
from paged_cache.planning.quantization import scheme_of

HIDDEN, LAYERS, VOCAB = 256, 2, 512
EMBEDDINGS, NORMS = 2 * VOCAB * HIDDEN, (2 * LAYERS + 1) * HIDDEN
PROJECTIONS = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * 1024)


def config(**quantization):
    """A small Llama, quantised."""
    return LlamaConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=VOCAB, num_attention_heads=4, intermediate_size=1024,
        quantization_config=quantization, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 4.127),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.15625),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4.3125),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
            },
            4.15625,
        ),
    ],
)
def test_bits_with_scales(quantization, bits):
    """Projections take the method's bits, scales included; embeddings, the output layer and norms the dtype's 16."""
    weights = plan(config(**quantization), memory="1GiB").weights

    assert weights.num_parameters == EMBEDDINGS + NORMS + PROJECTIONS
    assert weights.nbytes == pytest.approx(2 * (EMBEDDINGS + NORMS) + PROJECTIONS * bits / 8, rel=1e-4)
    assert quantization["quant_method"] in weights.note


def test_layers_left_out_keep_their_dtype():
    """Modules named in `modules_to_not_convert` take 16 bits."""
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    whole = plan(config(**quantization), memory="1GiB").weights.nbytes
    part = plan(config(**quantization, modules_to_not_convert=["self_attn"]), memory="1GiB").weights.nbytes

    assert part - whole == LAYERS * 4 * HIDDEN * HIDDEN * 12 // 8


def test_an_unknown_method_is_said():
    """Weights whose bits are not known count as if they were not quantised, and the note says so."""
    weights = plan(config(quant_method="zip"), memory="1GiB").weights

    assert weights.nbytes == 2 * weights.num_parameters
    assert "'zip' are not known" in weights.note
    assert scheme_of(LlamaConfig()) is None


def test_weights_that_are_given_or_elsewhere():
    """A size that is given counts instead of the computed one; weights elsewhere take nothing."""
    given = plan(config(), memory="1GiB", weights_memory="100MiB", overhead=0)
    elsewhere = plan(config(), memory="1GiB", with_weights=False, overhead=0)

    assert given.available == 2**30 - 100 * 2**20
    assert elsewhere.available == 2**30
    assert given.weights.num_parameters == elsewhere.weights.num_parameters == EMBEDDINGS + NORMS + PROJECTIONS


def test_tied_weights_count_once():
    """A model whose output layer is its embedding has one of the two."""
    tied, untied = config(), config()
    tied.tie_word_embeddings = True
    sizes = [plan(each, memory="1GiB").weights.num_parameters for each in (tied, untied)]

    assert sizes[1] - sizes[0] == VOCAB * HIDDEN


def test_no_memory_is_taken():
    """Counting a model of 400e9 parameters makes no tensor with memory."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(each.numel() for each in (out,) if isinstance(each, torch.Tensor) and not each.is_meta)
            return out

    large = LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
        vocab_size=128256, dtype="bfloat16",
    )  # fmt: skip
    with Watch():
        made = plan(large, memory="1TiB")

    assert made.weights.num_parameters == 405_853_388_800 + (0 if not large.tie_word_embeddings else -128256 * 16384)
    assert max(seen, default=0) < 1_000_000
