"""The reference is what every fast kernel is measured against: here it is measured against code that is not ours."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function
from transformers.masking_utils import sliding_window_causal_mask_function as window_mask_function
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from paged_cache.kernels.reference import paged_attention
from tests.kernels.cases import Case, Inputs, build, seen_positions, seen_range

FEATURES = {"window": 24, "chunk": 20, "softcap": 2.0, "sinks": True}
EXACT = {"dtype": torch.float64, "lens": (37, 1, 70, 0, 16, 15, 17)}
SHAPES = [
    Case(**EXACT),
    Case(**EXACT, q_len=5),
    Case(**EXACT, q_len=40),  # more queries than some rows have tokens: those before the first token see nothing
    Case(**EXACT, group=1),
    Case(**EXACT, group=3, head_dim=80),
    Case(**EXACT, head_dim=48, v_head_dim=32),
    Case(**EXACT, block_size=4),
    Case(**EXACT, block_size=64, layout="HND"),
    Case(**EXACT, layout="packed"),
    Case(**EXACT, layout="odd"),
]
SINGLE = [Case(**EXACT, q_len=q_len, **{name: FEATURES[name]}) for name in FEATURES for q_len in (1, 5)]
PAIRS = [Case(**EXACT, q_len=5, **{name: FEATURES[name] for name in pair}) for pair in combinations(FEATURES, 2)]
EDGES = [
    Case(**EXACT, q_len=5, window=1),
    Case(**EXACT, q_len=5, window=1000),
    Case(**EXACT, q_len=5, chunk=1),
    Case(**EXACT, chunk=16, block_size=16),
    Case(**EXACT, gain=300.0),  # exp() of such scores overflows unless the maximum is subtracted
    Case(**EXACT, q_len=5, **FEATURES),
]


def naive_attention(inputs: Inputs) -> torch.Tensor:
    """The contract, one query and one head at a time, on the dense keys and values."""
    case, options = inputs.case, inputs.options
    v_dim, num_heads = case.v_head_dim or case.head_dim, case.num_kv_heads * case.group
    out = torch.zeros(len(case.lens), case.q_len, num_heads, v_dim, dtype=case.dtype)
    for row, length in enumerate(case.lens):
        for i in range(case.q_len):
            seen = list(seen_range(case, length - case.q_len + i))
            for head in range(num_heads if seen and seen[-1] >= 0 else 0):
                keys = inputs.keys[row][seen, head // case.group]
                score = keys @ inputs.query[row, head, i] * options["scale"]
                if case.softcap is not None:
                    score = case.softcap * torch.tanh(score / case.softcap)
                weight = score.exp() if case.gain == 1.0 else (score - score.max()).exp()
                total = weight.sum() + (inputs.sinks[head].exp() if case.sinks else 0.0)
                out[row, i, head] = (weight / total) @ inputs.values[row][seen, head // case.group]
    return out


@pytest.mark.parametrize("case", SHAPES + SINGLE + PAIRS + EDGES, ids=str)
def test_equals_a_loop_over_dense_keys(case: Case) -> None:
    """Every shape and feature, alone and in pairs, against one query at a time; poison in unused memory has no effect."""
    inputs = build(case)
    out = inputs.run(paged_attention)
    assert out.is_contiguous()
    rounding = 1e-12 * case.gain  # of the scores, which the softmax passes on
    torch.testing.assert_close(out, naive_attention(inputs), rtol=rounding, atol=rounding)


def dense_row(inputs: Inputs, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row `row` as `[1, heads, tokens, dim]`: its queries, keys and values, KV heads not yet repeated."""
    key, value = (x[row].transpose(0, 1)[None] for x in (inputs.keys, inputs.values))
    return inputs.query[row : row + 1], key, value


def visible(mask_function, inputs: Inputs, row: int) -> torch.Tensor:
    """The mask function of transformers as a bool `[q_len, tokens]`."""
    length, q_len = inputs.case.lens[row], inputs.case.q_len
    q_pos = torch.arange(length - q_len, length)[:, None]
    return mask_function(0, 0, q_pos, torch.arange(length)[None, :]).expand(q_len, length)


NO_PADDING = torch.zeros(1, dtype=torch.long)
MASKS = {
    "causal": (causal_mask_function, {}),
    "window": (window_mask_function(24), {"window": 24}),
    "window=1": (window_mask_function(1), {"window": 1}),
    "chunk": (chunked_causal_mask_function(20, NO_PADDING), {"chunk": 20}),
}


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("name", MASKS)
def test_equals_sdpa_under_the_masks_of_transformers(name: str, q_len: int) -> None:
    """`window` and `chunk` count as transformers' masks do; torch's own attention agrees."""
    mask_function, feature = MASKS[name]
    inputs = build(Case(lens=(37, 5, 70, 20, 41), q_len=q_len, dtype=torch.float64, **feature))
    out = inputs.run(paged_attention)
    for row in range(len(inputs.case.lens)):
        mask = visible(mask_function, inputs, row)
        expected = F.scaled_dot_product_attention(
            *dense_row(inputs, row), attn_mask=mask, scale=inputs.options["scale"], enable_gqa=True
        )
        torch.testing.assert_close(out[row], expected[0].transpose(0, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("attention", "feature", "tolerance"),
    [
        (gpt_oss_attention, {"sinks": True}, 1e-12),
        (gemma2_attention, {"softcap": 2.0}, 1e-5),  # its softmax is in float32
    ],
    ids=["sinks", "softcap"],
)
def test_equals_the_models_that_brought_a_feature(attention, feature: dict, tolerance: float) -> None:
    """Sinks are GPT-OSS's, the soft cap is Gemma 2's."""
    inputs = build(Case(lens=(37, 5, 70), q_len=5, dtype=torch.float64, **feature))
    module = SimpleNamespace(num_key_value_groups=inputs.case.group, sinks=inputs.sinks, training=False)
    out = inputs.run(paged_attention)
    for row in range(len(inputs.case.lens)):
        mask = torch.zeros(5, inputs.case.lens[row], dtype=torch.float64)
        mask.masked_fill_(~visible(causal_mask_function, inputs, row), float("-inf"))
        expected, _ = attention(
            module, *dense_row(inputs, row), mask, scaling=inputs.options["scale"], softcap=inputs.case.softcap
        )
        torch.testing.assert_close(out[row], expected[0], rtol=tolerance, atol=tolerance)


def test_sees_no_key_and_yields_zeros() -> None:
    """Rows of length 0 and queries before a row's first token, also where a sink alone would fill the softmax."""
    for sinks in (False, True):
        inputs = build(Case(lens=(0, 2), q_len=3, sinks=sinks))
        out = inputs.run(paged_attention)
        assert not out[0].any()
        assert not out[1, 0].any()
        assert out[1, 1:].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_computes_half_precision_in_float32(dtype: torch.dtype) -> None:
    """16-bit inputs lose nothing but the rounding of the result, half a unit in the last place."""
    inputs = build(Case(dtype=dtype, head_dim=128))
    out = inputs.run(paged_attention)
    assert out.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), inputs.double().run(paged_attention), rtol=1.01 * half_ulp, atol=1e-6)


def test_a_nan_of_the_model_is_not_hidden() -> None:
    """NaN in a query comes out as NaN in its row and head, and only there."""
    inputs = build(Case(lens=(5, 6)))
    inputs.query[1, 3] = float("nan")
    out = inputs.run(paged_attention)
    assert out[1, 0, 3].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_the_cases_are_poisoned() -> None:
    """The helpers do what these tests rest on: -1 and NaN wherever nothing is seen, data wherever something is."""
    inputs = build(Case(lens=(100, 3), window=20, q_len=2))
    assert seen_positions(inputs.case, 100) == range(79, 100)
    assert (inputs.block_table[0] >= 0).tolist() == [False] * 4 + [True] * 3 + [False] * 2
    assert int((~inputs.key_cache.isnan()).all(-1).all(-1).sum()) == 21 + 3
