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

from paged_cache.kernels.quantized import LARGEST, dequantize, quantize
from paged_cache.kernels.reference import copy_blocks, paged_attention, write_kv
from tests.kernels.cases import Case, Inputs, build, seen_positions, seen_range

FEATURES = {"window": 24, "chunk": 20, "softcap": 2.0, "sinks": True, "alibi": True, "bias": 7}
FEATURES |= {"starts": (3, 0, 65, 0, 20, 0, 16)}
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
    Case(**EXACT, q_len=5, bias=1),
]
PACKED = {"q_lens": (20, 1, 33, 0, 1, 0, 5), "bias": 0}
PACKS = [
    Case(**EXACT, q_lens=PACKED["q_lens"]),
    Case(**EXACT, **FEATURES | PACKED),
    Case(**EXACT, q_lens=(5, 1, 70, 0, 1, 0, 5), window=24),  # rows whose filler columns would see more than their own
    Case(**EXACT, q_lens=(40, 0, 0, 0, 0, 0, 0)),  # more queries than the row has tokens
]
QUANTISED = [
    Case(**EXACT, kv_dtype=dtype, layout=layout, **more)
    for dtype in (torch.int8, torch.float8_e4m3fn)
    for layout, more in (("NHD", {}), ("HND", {"head_dim": 48, "v_head_dim": 32}), ("odd", FEATURES | PACKED))
]


def naive_attention(inputs: Inputs) -> torch.Tensor:
    """The contract, one query and one head at a time, on the dense keys and values."""
    case = inputs.case
    outs = [torch.zeros(n, case.num_heads, case.v_head_dim or case.head_dim, dtype=case.dtype) for n in case.new_tokens]
    for row, length in enumerate(case.lens):
        for i in range(case.new_tokens[row]):
            seen = [j for j in seen_range(case, row, length - case.new_tokens[row] + i) if j >= 0]
            for head in range(case.num_heads if seen else 0):
                outs[row][i, head] = naive_head(inputs, row, i, head, seen)
    return torch.cat(outs)[None] if case.q_lens else torch.stack(outs)


def naive_head(inputs: Inputs, row: int, i: int, head: int, seen: list[int]) -> torch.Tensor:
    """One query of one head over the keys it sees."""
    case, extras = inputs.case, inputs.extras
    query = inputs.query[0, :, sum(case.q_lens[:row]) + i] if case.q_lens else inputs.query[row, :, i]
    score = inputs.keys[row][seen, head // case.group] @ query[head] * inputs.options["scale"]
    if case.softcap is not None:
        score = case.softcap * torch.tanh(score / case.softcap)
    if case.alibi:
        score = score + extras["alibi_slopes"][head].double() * (torch.tensor(seen) - seen[-1])
    if case.bias:
        score = score + extras["position_bias"][row % case.bias, head, i, seen]
    weight = score.exp() if case.gain == 1.0 else (score - score.max()).exp()
    total = weight.sum() + (extras["sinks"][head].exp() if case.sinks else 0.0)
    return (weight / total) @ inputs.values[row][seen, head // case.group]


@pytest.mark.parametrize("case", SHAPES + SINGLE + PAIRS + EDGES + PACKS + QUANTISED, ids=str)
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
    module = SimpleNamespace(num_key_value_groups=inputs.case.group, sinks=inputs.extras.get("sinks"), training=False)
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
    assert seen_positions(inputs.case, 0, 100) == range(79, 100)
    assert (inputs.block_table[0] >= 0).tolist() == [False] * 4 + [True] * 3 + [False] * 2
    assert int((~inputs.key_cache.isnan()).all(-1).all(-1).sum()) == 21 + 3


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_quantised_vectors_keep_their_shape(dtype: torch.dtype) -> None:
    """Half a step of the scale for int8, half a unit of 3 bits for e4m3; zeros and huge and tiny vectors included."""
    x = torch.randn(50, 3, 64) * 10.0 ** torch.arange(-25, 25)[:, None, None]
    x[0] = 0
    codes, scale = quantize(x, dtype)
    error = (dequantize(codes, scale) - x).abs()
    step = scale[..., None] if dtype is torch.int8 else (x.abs() * 2**-3).maximum(scale[..., None] * 2**-9)
    assert codes.dtype == dtype
    assert (error <= 0.501 * step).all()
    assert not dequantize(codes, scale)[0].any()


@pytest.mark.parametrize("kv_dtype", [None, *LARGEST], ids=str)
def test_written_tokens_are_read_back(kv_dtype: torch.dtype | None) -> None:
    """`write_kv` puts each token where `slot_mapping` says and touches nothing else; -1 is left out."""
    inputs = build(Case(kv_dtype=kv_dtype, layout="HND", v_head_dim=32))
    scales = {name: x for name, x in inputs.extras.items() if name.endswith("scales")}
    keys, values = torch.randn(4, 2, 64), torch.randn(4, 2, 32)
    table, before = inputs.block_table[2], inputs.run(paged_attention)
    slots = torch.stack([table[i // 16] * 16 + i % 16 for i in (0, 17, 129)] + [torch.tensor(-1)]).long()
    write_kv(keys, values, inputs.key_cache, inputs.value_cache, slots, **scales)
    for i, position in enumerate((0, 17, 129)):
        rounded = [x[i] if kv_dtype is None else dequantize(*quantize(x[i], kv_dtype)) for x in (keys, values)]
        inputs.keys[2][position], inputs.values[2][position] = rounded
    after = inputs.run(paged_attention)
    torch.testing.assert_close(after, naive_attention(inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(before[:2], after[:2])


def test_copied_blocks_are_the_same_bytes() -> None:
    """All slabs at once, whatever their dtype; other blocks stay."""
    slabs = [torch.randn(6, 8), torch.randint(0, 255, (6, 4)).to(torch.uint8).view(torch.float8_e4m3fn)]
    wanted = [x.view(torch.uint8).clone() for x in slabs]
    for x in wanted:
        x[[4, 1]] = x[[0, 5]]
    copy_blocks(slabs, slabs, torch.tensor([[0, 4], [5, 1]]))
    assert all(torch.equal(x.view(torch.uint8), y) for x, y in zip(slabs, wanted, strict=True))
