"""The compiled CPU kernel in steps of a batcher: decoding rows and chunks of prompts in one call, layer after layer."""

import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from paged_cache.kernels.reference import paged_attention as reference
from tests.kernels.cases import Case, Inputs, build

pytest.importorskip("numba")
cpu = pytest.importorskip("paged_cache.kernels.cpu")

# Decoding rows within and beyond a run of 256 tokens; prompts from their first token on; a chunk behind a prefix; a row that rests.
LENS = (200, 37, 600, 5, 1, 300, 130, 530, 16)
NEW = (1, 1, 1, 2, 1, 300, 130, 250, 0)
CASES = [
    *(Case(LENS, q_lens=NEW, num_kv_heads=heads, group=group) for heads, group in ((4, 2), (2, 3), (3, 1), (1, 40))),
    Case(LENS, q_lens=NEW, num_kv_heads=4, head_dim=32, layout="HND", dtype=torch.bfloat16, sinks=True, softcap=3.0),
    Case(LENS, q_lens=NEW, num_kv_heads=4, head_dim=40, window=100, alibi=True, block_size=7),
    Case(LENS, q_lens=NEW, num_kv_heads=4, kv_dtype=torch.int8, chunk=90),
    Case(LENS, q_lens=NEW, num_kv_heads=2, starts=(3, 0, 300, 1, 0, 20, 100, 400, 0)),
]


def row_of(inputs: Inputs, row: int) -> Inputs:
    """One row of a pack, as a pack."""
    starts = inputs.extras["cu_seqlens_q"].tolist()
    new = starts[row + 1] - starts[row]
    return replace(
        inputs,
        case=replace(inputs.case, lens=inputs.case.lens[row : row + 1], q_lens=(new,)),
        query=inputs.query[:, :, starts[row] : starts[row + 1]],
        block_table=inputs.block_table[row : row + 1],
        seq_lens=inputs.seq_lens[row : row + 1],
        extras=inputs.extras | {"cu_seqlens_q": torch.tensor([0, new], dtype=torch.int32)},
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixed_packs_equal_the_reference(case: Case) -> None:
    """Rows that take all kv heads at once and rows that take one, side by side."""
    inputs = build(case)
    tolerance = 2e-6 if case.dtype is torch.float32 else 2**-8
    exact, out = inputs.double().run(reference), inputs.run(cpu.paged_attention)

    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_a_row_does_not_depend_on_the_pack(num_threads: int) -> None:
    """Bit-equal alone and beside rows of any length, with any number of threads."""
    inputs = build(CASES[0])
    together, starts = inputs.run(cpu.paged_attention), inputs.extras["cu_seqlens_q"].tolist()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(together, inputs.run(cpu.paged_attention))
        for row in range(len(LENS)):
            alone = row_of(inputs, row).run(cpu.paged_attention)
            assert torch.equal(together[:, starts[row] : starts[row + 1]], alone)
    finally:
        torch.set_num_threads(before)


def test_layers_of_all_kinds_share_a_memo() -> None:
    """Layers with other tensors, numbers of heads, dtypes, strides or masks are computed as without a memo, in any order."""
    first = build(CASES[0])
    layers = [
        first,
        replace(first, query=first.query * 2, key_cache=first.key_cache * 3, value_cache=first.value_cache * 5),
        replace(first, query=first.query.contiguous()),
        replace(
            first,
            query=first.query[:, :4],
            key_cache=first.key_cache[:, :, 1:3],
            value_cache=first.value_cache[:, :, :2],
        ),
        replace(first, query=first.query.bfloat16()),
        replace(first, extras=first.extras | {"sinks": torch.randn(8)}),
        replace(first, extras=first.extras | {"sinks": torch.randn(8)}),
        replace(first, case=replace(first.case, window=50)),
        replace(first, case=replace(first.case, gain=4.0)),
    ]
    memo: dict = {}
    for _ in range(2):
        for layer in layers:
            assert torch.equal(layer.run(cpu.paged_attention), layer.run(partial(cpu.paged_attention, memo=memo)))


def test_a_memo_outlives_other_calls_and_threads() -> None:
    """Calls that need more memory, and a Python thread with memory of its own, may come between two layers."""
    inputs, large, memo = build(CASES[0]), build(Case((20000, 3, 16400), q_len=40, group=2, num_kv_heads=1)), {}
    expected = inputs.run(cpu.paged_attention)
    layer = partial(inputs.run, partial(cpu.paged_attention, memo=memo))
    found = [layer()]
    large.run(cpu.paged_attention)
    found.append(layer())
    thread = threading.Thread(target=lambda: found.append(layer()))
    thread.start()
    thread.join()
    found.append(layer())

    assert len(found) == 4
    assert all(torch.equal(out, expected) for out in found)


@pytest.mark.parametrize(
    ("case", "is_shared"), [(Case((128,), q_len=128), True), (Case((128,), q_len=1), False)], ids=str
)
def test_work_decides_about_threads(case: Case, is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is shared among threads even if its keys and values are few; a short decoding row is not."""
    asked = []
    monkeypatch.setattr(cpu.attention, "num_threads", lambda: asked.append(1) or 1)
    build(case).run(cpu.paged_attention)

    assert bool(asked) == is_shared
