"""The Triton attention kernel against the reference, on a GPU or, where TRITON_INTERPRET is set, on CPU tensors.

Triton reads that variable when a kernel is defined, so the interpreter needs a process of its own:
../test_triton_attention.py starts it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import reference
from paged_cache.kernels.quantized import LARGEST
from paged_cache.kernels.triton import attention, plan
from paged_cache.kernels.triton.attention import TL_DTYPES
from tests.kernels.cases import Case, Inputs, build

DEVICE = "cpu" if attention.INTERPRETED else "cuda"
pytestmark = [] if attention.INTERPRETED else [pytest.mark.gpu]

RAGGED = (0, 1, 15, 16, 17, 37, 130)  # none, one, and a block of 16 with one token less and more
FEATURES = {"window": 24, "chunk": 20, "softcap": 2.0, "sinks": True, "alibi": True, "bias": 4}
FEATURES |= {"starts": (3, 0, 65, 0)}
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},  # other orders of summation
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},  # probabilities and result rounded to 2**-11
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},  # to 2**-8: the interpreter truncates
}
QUANTISED = {
    torch.float32: TOLERANCES[torch.float32],
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 8e-3},
}

LENGTHS = [
    *(Case(lens=RAGGED, q_len=q_len, num_splits=num_splits, group=2) for q_len in (1, 5) for num_splits in (1, 3)),
    Case(lens=(0, 40, 130), num_kv_heads=1, num_splits=17),  # most splits are empty; the merge takes 16 at a time
    Case(lens=(300, 17), num_kv_heads=1, head_dim=256, num_splits=19),  # none is: tiles have 16 keys here
]
GROUPS = [Case(group=group, num_splits=2) for group in (1, 3, 7, 8)] + [
    Case(group=71, num_kv_heads=1, dtype=torch.float16, num_splits=2),  # more than one tile of 64 rows
    Case(group=4, q_len=16, dtype=torch.float16, num_splits=2),
]
PROMPTS = [
    Case(lens=(130, 40, 0, 7), q_len=40, group=3, dtype=torch.float16, num_splits=num_splits, **more)
    for num_splits, more in ((1, {}), (3, {}), (1, {"window": 24}), (2, FEATURES))
]
PACKED = [
    Case(q_lens=(20, 1, 33, 0), num_splits=num_splits, dtype=torch.float16, group=group)
    for num_splits, group in ((1, 4), (3, 3))
] + [
    Case(lens=RAGGED, q_lens=(0, 1, 15, 16, 3, 5, 1), num_splits=2),
    Case(lens=(20, 1, 33, 64), q_lens=(20, 1, 33, 64), group=2, num_splits=2),
    Case(q_lens=(1, 1, 1, 0), num_splits=3),
    Case(q_lens=(40, 0, 0, 0), num_splits=1),  # more queries than the row has tokens
    Case(q_lens=(5, 1, 70, 0), num_splits=2, head_dim=80, layout="HND", **FEATURES | {"bias": 0}),
]
HEAD_DIMS = [Case(head_dim=dim, num_splits=2) for dim in (16, 80, 96, 112, 128, 256)] + [
    Case(head_dim=192, v_head_dim=128, num_splits=2),
    Case(head_dim=40, v_head_dim=72, num_splits=1),
]
SINGLE = [Case(q_len=q_len, num_splits=3, **{name: FEATURES[name]}) for name in FEATURES for q_len in (1, 5)]
PAIRS = [Case(q_len=3, num_splits=2, **{name: FEATURES[name] for name in two}) for two in combinations(FEATURES, 2)]
FEATURE_EDGES = [
    Case(window=1, q_len=3, num_splits=1),
    Case(window=64, num_splits=5, lens=(130, 64, 65), head_dim=80),
    Case(window=200, lens=(300, 30), num_kv_heads=1, dtype=torch.float16, q_len=40, num_splits=2),  # edges at both ends
    Case(chunk=1, q_len=3, num_splits=1),
    Case(chunk=64, num_splits=5, lens=(130, 64, 65)),
    Case(q_len=5, num_splits=5, sinks=True, lens=(0, 3, 70)),
    Case(bias=1, q_len=5, num_splits=2),
    Case(starts=(37, 0, 129, 0), q_len=3, num_splits=2, sinks=True),  # a row that is nothing but padding
    Case(q_len=5, num_splits=1, **FEATURES),
    Case(gain=100.0, num_splits=2),  # exp2 of such scores overflows unless the maximum is subtracted
    Case(gain=100.0, num_splits=2, softcap=30.0),
]
MEMORY = [
    *(Case(block_size=size, num_splits=2) for size in (1, 4, 12, 64, 128)),
    *(Case(layout=layout, num_splits=2) for layout in ("HND", "packed", "head_major", "odd")),
    *(Case(block_size=64, num_splits=2, q_len=3, **{name: FEATURES[name]}) for name in ("window", "chunk", "starts")),
    Case(spare_blocks=0, lens=(128, 16)),
]
DTYPES = [
    Case(dtype=dtype, head_dim=128, num_splits=num_splits)
    for dtype in (torch.float16, torch.bfloat16)
    for num_splits in (1, 3)
] + [Case(dtype=torch.bfloat16, q_len=3, num_splits=2, **FEATURES)]
CODES = [
    Case(kv_dtype=kv_dtype, num_splits=2, **more)
    for kv_dtype in LARGEST
    for more in (
        {},
        {"dtype": torch.bfloat16, "layout": "HND", "q_len": 3, **FEATURES},
        {"dtype": torch.float16, "layout": "packed", "block_size": 64, "head_dim": 48, "v_head_dim": 80},
        {"layout": "odd", "q_lens": (5, 1, 20, 0)},
    )
]
CASES = LENGTHS + GROUPS + PROMPTS + PACKED + HEAD_DIMS + SINGLE + PAIRS + FEATURE_EDGES + MEMORY + DTYPES + CODES


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher allocates is full of NaN: whatever is not written, or read unwritten, shows."""
    new_empty = torch.Tensor.new_empty

    def new_poisoned(*args, **kwargs) -> torch.Tensor:
        tensor = new_empty(*args, **kwargs)
        if not tensor.numel():  # the interpreter's own are empty and of any dtype
            return tensor
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**31 - 1)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_poisoned)


def force_splits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest rows get the case's number of splits, however short they become."""
    split_len = math.ceil(max(case.lens) / case.num_splits)
    budget = {1: lambda *_: (0, 1)}.get(
        case.num_splits, lambda shape, batch, tiles: (tiles * case.num_splits, split_len)
    )
    monkeypatch.setattr(plan.Shape, "_budget", budget)


def run(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The kernel's result with the case's number of splits; if it is above 1, a merge has run."""
    if inputs.case.num_splits is None:
        return inputs.run(attention.paged_attention)
    merges = []
    merge = attention._merge
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_merge", lambda *args: merges.append(args) or merge(*args))
        force_splits(inputs.case, patch)
        out = inputs.run(attention.paged_attention)
    assert len(merges) == (inputs.case.num_splits > 1 and out.numel() > 0)
    return out


def tolerance(case: Case) -> dict[str, float]:
    """Scores round in proportion to their size."""
    return {name: x * case.gain for name, x in (QUANTISED if case.kv_dtype else TOLERANCES)[case.dtype].items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape and feature, alone and in pairs, against the reference in float64."""
    inputs = build(case, DEVICE)
    out = run(inputs, monkeypatch)
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    expected = inputs.double().run(reference.paged_attention)
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance(case))


def test_the_cache_may_be_wider_than_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two dtypes the products are computed in the wider one."""
    inputs = build(Case(num_splits=2), DEVICE)
    inputs = replace(inputs, query=inputs.query.half())
    expected = inputs.double().run(reference.paged_attention)
    torch.testing.assert_close(run(inputs, monkeypatch).cpu().double(), expected, rtol=1e-3, atol=1e-6)


def test_where_the_blocks_lie_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens in other blocks give the same result to the last bit."""
    inputs = build(Case(num_splits=3), DEVICE)
    order = torch.randperm(inputs.key_cache.shape[0], device=DEVICE)
    where = order.argsort().to(torch.int32)
    table = inputs.block_table
    moved = replace(
        inputs,
        key_cache=inputs.key_cache[order],
        value_cache=inputs.value_cache[order],
        block_table=torch.where(table >= 0, where[table.long()], table),
    )
    assert torch.equal(run(inputs, monkeypatch), run(moved, monkeypatch))


@pytest.mark.parametrize("kv_dtype", [None, *LARGEST], ids=str)
def test_the_batch_changes_no_bit(kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PAGED_CACHE_BATCH_INVARIANT, a row alone, in a batch, and packed with a prompt give the same bits."""
    monkeypatch.setenv("PAGED_CACHE_BATCH_INVARIANT", "1")
    case = Case(lens=(600, 37, 0, 130, 1, 64, 700, 15), num_kv_heads=1, dtype=torch.float16, kv_dtype=kv_dtype)
    inputs = build(case, DEVICE)
    together = inputs.run(attention.paged_attention)
    for row in (0, 1, 6):
        own = {name: getattr(inputs, name)[row : row + 1] for name in ("query", "block_table", "seq_lens")}
        alone = replace(inputs, **own).run(attention.paged_attention)
        assert torch.equal(alone[0], together[row])
    prompt = torch.randn(1, case.num_heads, 30, case.head_dim, device=DEVICE).half()
    packed = replace(
        inputs,
        query=torch.cat([prompt, inputs.query[6:7]], 2),
        block_table=inputs.block_table[[3, 6]],
        seq_lens=inputs.seq_lens[[3, 6]],
        extras=inputs.extras | {"cu_seqlens_q": torch.tensor([0, 30, 31], device=DEVICE).int()},
    )
    packed = packed.query, packed.key_cache, packed.value_cache, packed.block_table, packed.seq_lens, packed.options
    out = attention.paged_attention(*packed[:5], **packed[5], max_q_len=30)
    assert torch.equal(out[0, 30], together[6, 0])


@pytest.mark.parametrize("dtype", TL_DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", LARGEST, ids=str)
def test_every_code_is_exact(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """All finite codes are what they are as values, whatever their scale, and as keys."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes.where(codes.view(kv_dtype).float().isfinite(), 0).view(kv_dtype).view(2, 1, 1, 128)
    exact, zeros = codes.double().view(2, 128), torch.zeros_like(codes.view(torch.uint8)).view(kv_dtype)
    table, lens = torch.arange(2)[:, None].int(), torch.ones(2).int()

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, factor: float) -> torch.Tensor:
        scales = torch.full(keys.shape[:3], factor)
        tensors = (x.to(DEVICE) for x in (query.to(dtype), keys, values, table, lens * keys.shape[1]))
        more = {name: scales.to(DEVICE) for name in ("key_scales", "value_scales")}
        return attention.paged_attention(*tensors, scale=1.0, **more)[:, 0].cpu().double()

    for factor in (1.0, 2.0**-20, 2.0**7):
        out = attend(torch.ones(2, 1, 1, 128), zeros, codes, factor)
        torch.testing.assert_close(out[:, 0], (exact * factor).to(dtype).double(), rtol=0, atol=0)

    # Head h asks for element h, and so loudly that its score is 4 or -4 against the 0 of a second key.
    query = torch.diag_embed(4 / exact.abs().where(exact != 0, 1)).view(2, 128, 1, 128).float()
    keys = torch.cat([codes.view(torch.uint8), zeros.view(torch.uint8)], 1).view(kv_dtype)
    values = torch.tensor([1, 0])[None, :, None, None].expand(2, 2, 1, 128).contiguous().to(kv_dtype)
    out = attend(query, keys, values, 1.0)
    torch.testing.assert_close(out[..., 0], torch.sigmoid(4 * exact.sign()), rtol=0.03, atol=0)


def test_layers_of_a_step_share_the_work_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a memo there is one plan for all calls of the same shape, and another for another window."""
    plans = []
    make = plan.Shape.plan
    monkeypatch.setattr(plan.Shape, "plan", lambda *args: plans.append(args) or make(*args))
    inputs, memo = build(Case(), DEVICE), {}
    tensors = (inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.seq_lens)
    expected = inputs.run(attention.paged_attention)  # no row is as long as the window
    for window in (None, None, 200, None, 200):
        out = attention.paged_attention(*tensors, **inputs.options | {"window": window}, memo=memo)
        assert torch.equal(out, expected)
    assert len(plans) == 2 + 1


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
def test_layers_of_a_step_share_nothing_that_differs(
    kv_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a memo that knows a call, other tensors, strides and dtypes still count, and what is wrong is refused."""
    case = Case(lens=(5, 40), group=1, kv_dtype=kv_dtype, num_splits=2, sinks=True, alibi=True, bias=1)
    inputs, memo = build(case, DEVICE), {}
    force_splits(inputs.case, monkeypatch)

    def attend(inputs: Inputs) -> torch.Tensor:
        return inputs.run(lambda *tensors, **options: attention.paged_attention(*tensors, **options, memo=memo))

    def layer(**change: Callable) -> Inputs:
        return replace(inputs, **{name: f(getattr(inputs, name)) for name, f in change.items()})

    layers = [
        inputs,
        layer(query=lambda x: x * 2, value_cache=lambda x: x.clone()),
        layer(extras=lambda x: {name: y * 2 for name, y in x.items()}),
        layer(query=lambda x: x.half()),
        layer(query=lambda x: x.repeat(1, 1, 1, 2)[..., :64]),
        layer(key_cache=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        layer(extras=lambda x: {name: y for name, y in x.items() if "scales" in name}),
    ]
    expected = [one.run(attention.paged_attention) for one in layers]
    for i in (*range(len(layers)), 0, 1, 2, 3):
        assert torch.equal(attend(layers[i]), expected[i])
    assert len(memo) == 5
    with pytest.raises(InvalidRequestError, match="differ in head_dim"):
        attend(layer(query=lambda x: x[..., :32]))
    with pytest.raises(InvalidRequestError, match="no backward"):
        attend(layer(query=lambda x: x.detach().requires_grad_()))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min], ids=str)
def test_a_bias_hides_keys(hidden: float, num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in tiles that all queries could see. With a bias of -inf on all its keys a query sees none: zeros."""
    inputs = build(Case(lens=(250, 37), q_len=3, bias=2, num_splits=num_splits), DEVICE)
    inputs.extras["position_bias"][0, ..., :130] = hidden
    expected = inputs.double().run(reference.paged_attention)
    inputs.extras["position_bias"][1, 2, 1] = -math.inf
    expected[1, 1, 2] = 0.0
    torch.testing.assert_close(run(inputs, monkeypatch).cpu().double(), expected, **TOLERANCES[torch.float32])


def test_a_nan_of_the_model_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in a query comes out as NaN in its row and head, and only there; also through the merge."""
    inputs = build(Case(lens=(70, 6), num_splits=2), DEVICE)
    inputs.query[0, 3] = float("nan")
    out = run(inputs, monkeypatch)
    assert out[0, 0, 3].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_a_length_beyond_the_table_reads_nothing_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong length gives a wrong result, as it does in the reference, but no access outside the table."""
    inputs = build(Case(lens=(128, 64), spare_blocks=0, num_splits=1), DEVICE)
    inputs.seq_lens[0] = 1000
    expected = inputs.double().run(reference.paged_attention)
    torch.testing.assert_close(run(inputs, monkeypatch).cpu().double(), expected, **TOLERANCES[torch.float32])


def test_an_empty_batch_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows, or no new tokens, give an empty result."""
    inputs = build(Case(), DEVICE)
    empty = replace(inputs, query=inputs.query[:0], block_table=inputs.block_table[:0], seq_lens=inputs.seq_lens[:0])
    assert run(empty, monkeypatch).shape == (0, 1, 8, 64)
    assert run(replace(inputs, query=inputs.query[:, :, :0]), monkeypatch).shape == (4, 0, 8, 64)


def changed(**tensors: object) -> Inputs:
    inputs = build(Case(lens=(5, 6)), DEVICE)
    return replace(inputs, **{name: change(getattr(inputs, name)) for name, change in tensors.items()})


REFUSED = {
    "query is torch.float64": changed(query=lambda x: x.double()),
    "value cache torch.float16": changed(value_cache=lambda x: x.half()),
    "head dimensions 8": changed(query=lambda x: x[..., :8], key_cache=lambda x: x[..., :8]),
    "and 512": changed(value_cache=lambda x: x.repeat(1, 1, 1, 8)),
    "last strides": changed(key_cache=lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)),
}
WITH_GRADIENT = ("query", "sinks", "alibi_slopes", "position_bias")
INVALID = {
    "differ in head_dim": changed(query=lambda x: x[..., :32]),
    "all but the last dimension": changed(value_cache=lambda x: x[1:]),
    "7 query heads": changed(query=lambda x: x[:, :7]),
    "block_table is": changed(block_table=lambda x: x[:1]),
    "does not fit 3 sequence": changed(seq_lens=lambda x: x.new_ones(3)),
    "sinks is \\(5,\\)": changed(extras=lambda _: {"sinks": torch.zeros(5, device=DEVICE)}),
    "on one device": changed(seq_lens=lambda x: x.to("meta")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_supports_names_the_reason(reason: str) -> None:
    """What the kernel does not take is refused by `supports`, and in the same words by the kernel."""
    inputs = REFUSED[reason]
    assert reason in attention.supports(inputs.query, inputs.key_cache, inputs.value_cache)
    with pytest.raises(InvalidRequestError, match=reason):
        inputs.run(attention.paged_attention)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradients_are_refused(name: str) -> None:
    """Whichever argument wants one, but not where none is recorded."""
    inputs = build(Case(lens=(5, 6), sinks=True, alibi=True, bias=1), DEVICE)
    (inputs.query if name == "query" else inputs.extras[name]).requires_grad_()
    with pytest.raises(InvalidRequestError, match="no backward"):
        inputs.run(attention.paged_attention)
    with torch.no_grad():
        assert inputs.run(attention.paged_attention).isfinite().all()


def test_supports_takes_what_the_matrix_covers() -> None:
    """No reason to refuse an ordinary call."""
    inputs = build(Case(q_len=16, **FEATURES), DEVICE)
    assert attention.supports(inputs.query, inputs.key_cache, inputs.value_cache) is None


def test_tables_of_other_integers() -> None:
    """int64 tables and lengths, and strided ones, mean the same."""
    inputs = build(Case(lens=(5, 40)), DEVICE)
    wide = replace(inputs, block_table=inputs.block_table.long().T.contiguous().T, seq_lens=inputs.seq_lens.long())
    assert torch.equal(inputs.run(attention.paged_attention), wide.run(attention.paged_attention))


@pytest.mark.parametrize("message", INVALID)
def test_shapes_that_do_not_fit_are_refused(message: str) -> None:
    """Nothing is launched that would read beyond a tensor."""
    with pytest.raises(InvalidRequestError, match=message):
        INVALID[message].run(attention.paged_attention)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_a_cuda_graph_follows_the_lengths(num_splits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths and tables are read when the graph runs; capturing it waits for nothing."""
    before = build(Case(lens=(1, 0, 3, 0), num_splits=num_splits, spare_blocks=9), DEVICE)
    after = build(Case(lens=(130, 17, 0, 64), num_splits=num_splits), DEVICE)
    static = replace(after, block_table=torch.full_like(after.block_table, -1), seq_lens=before.seq_lens.clone())
    static.block_table[:, :1] = 0
    run(static, monkeypatch)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static, monkeypatch)
    static.block_table.copy_(after.block_table)
    static.seq_lens.copy_(after.seq_lens)
    graph.replay()
    expected = after.double().run(reference.paged_attention)
    torch.testing.assert_close(out.cpu().double(), expected, **TOLERANCES[torch.float32])
