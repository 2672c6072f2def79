"""The compiled CPU kernel against the reference in float64, on pools whose unused memory is poisoned."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels.reference import paged_attention as reference
from tests.kernels.cases import Case, Inputs, build

pytest.importorskip("numba")
cpu = pytest.importorskip("paged_cache.kernels.cpu")

RAGGED = (0, 1, 15, 16, 17, 37, 130, 1000)  # around one block, one tile of 64 tokens, one run of 256
FEATURES = {"window": 24, "chunk": 48, "softcap": 2.0, "sinks": True}
TOLERANCE = {
    torch.float32: 2e-6,  # sums of up to 1000 terms in another order
    torch.bfloat16: 2**-8,  # half a unit in the last of 8 bits of the output
    torch.float16: 2**-11,  # the same with 11 bits
}
SHAPES = [
    *(Case(RAGGED, group=group) for group in (1, 3, 4, 8)),
    *(Case(RAGGED, head_dim=dim) for dim in (8, 64, 80, 128)),
    Case(RAGGED, head_dim=192, v_head_dim=128),
    Case(RAGGED, head_dim=512, v_head_dim=64, group=8, num_kv_heads=1),
    *(Case(RAGGED, layout=layout) for layout in ("HND", "packed", "head_major", "odd")),
    *(Case(RAGGED, block_size=size) for size in (1, 7, 64, 256)),
    *(Case(RAGGED, q_len=q_len, group=group) for q_len in (4, 9, 40) for group in (1, 3, 8)),
    Case((130, 40), q_len=40, group=40, num_kv_heads=1),  # a group larger than a query tile
    Case((20000, 3, 16400), group=2, num_kv_heads=1),  # runs longer than the shortest
    Case(RAGGED, gain=300.0),  # exp() of such scores overflows unless the maximum is subtracted
    Case((0, 0)),
]
SINGLE = [Case(RAGGED, q_len=q_len, **{name: FEATURES[name]}) for name in FEATURES for q_len in (1, 4, 40)]
COMBINED = [Case(RAGGED, q_len=9, **{name: FEATURES[name] for name in pair}) for pair in combinations(FEATURES, 2)]
COMBINED += [Case(RAGGED, q_len=q_len, group=3, head_dim=80, layout="HND", **FEATURES) for q_len in (1, 40)]
COMBINED += [Case(RAGGED, window=500), Case(RAGGED, chunk=300, q_len=4), Case(RAGGED, window=1)]
DTYPES = [
    Case(RAGGED, dtype=dtype, q_len=q_len, **options)
    for dtype in (torch.bfloat16, torch.float16)
    for q_len, options in ((1, {}), (9, FEATURES), (4, {"head_dim": 72, "v_head_dim": 40}))
]


def check(inputs: Inputs, out: torch.Tensor) -> None:
    """`out` is the exact result, up to the rounding of its dtype."""
    exact = inputs.double().run(reference)
    tolerance = TOLERANCE[out.dtype] * inputs.case.gain

    assert exact.shape == out.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", [*SHAPES, *SINGLE, *COMBINED, *DTYPES], ids=str)
def test_equals_the_reference(case: Case) -> None:
    """Every shape, layout, dtype and feature gives the exact result without reading what no query sees."""
    inputs = build(case)

    check(inputs, inputs.run(cpu.paged_attention))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_stored_number_is_read_and_written_exactly(dtype: torch.dtype) -> None:
    """All finite bit patterns, subnormals included, survive the way through the kernel: one visible key has weight 1."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    values = torch.cat([patterns, patterns[: -patterns.numel() % 64]]).view(-1, 1, 1, 64)
    rows = values.shape[0]
    table = torch.arange(rows, dtype=torch.int32)[:, None]
    query = torch.ones(rows, 1, 1, 64, dtype=dtype)

    out = cpu.paged_attention(query, values * 0, values, table, torch.ones(rows, dtype=torch.int32), scale=1.0)

    assert torch.equal(values.flatten(), out.flatten())


def test_half_precision_cache_under_float32_queries() -> None:
    """Queries and keys may differ in dtype; the output has that of the queries."""
    inputs = build(Case(RAGGED, dtype=torch.bfloat16))
    inputs = replace(inputs, query=inputs.query.float())

    check(inputs, inputs.run(cpu.paged_attention))


@pytest.mark.parametrize("q_len", [1, 9])
def test_does_not_depend_on_where_blocks_lie(q_len: int) -> None:
    """Bit-equal after all blocks were moved to other places."""
    inputs = build(Case(RAGGED, q_len=q_len))
    order = torch.randperm(inputs.key_cache.shape[0])
    table = torch.where(inputs.block_table < 0, -1, order.argsort().int()[inputs.block_table.clamp(min=0)])
    moved = replace(
        inputs, key_cache=inputs.key_cache[order], value_cache=inputs.value_cache[order], block_table=table.int()
    )

    assert torch.equal(inputs.run(cpu.paged_attention), moved.run(cpu.paged_attention))


def test_does_not_depend_on_the_batch_or_the_threads() -> None:
    """Bit-equal alone, in a batch, and with one thread."""
    inputs = build(Case((1000, 300, 17, 5000)))
    together = inputs.run(cpu.paged_attention)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(together, inputs.run(cpu.paged_attention))
    finally:
        torch.set_num_threads(threads)

    for row in range(4):
        one = slice(row, row + 1)
        alone = replace(
            inputs, query=inputs.query[one], block_table=inputs.block_table[one], seq_lens=inputs.seq_lens[one]
        )

        assert torch.equal(together[one], alone.run(cpu.paged_attention))


def test_says_why_a_call_is_not_taken() -> None:
    """`supports` names the obstacle, and the kernel refuses what it would get wrong."""
    inputs = build(Case())
    query, keys, values = inputs.query, inputs.key_cache, inputs.value_cache
    strided = keys.transpose(2, 3).contiguous().transpose(2, 3)

    assert cpu.supports(query, keys, values) is None
    assert cpu.supports(query.double(), keys, values) == "queries are torch.float64, not float32, bfloat16 or float16"
    assert "torch.float64" in cpu.supports(query, keys, values.double())
    assert "contiguous" in cpu.supports(query, strided, values)
    assert "gradient" in cpu.supports(query.clone().requires_grad_(), keys, values)
    with pytest.raises(InvalidRequestError, match="block_table is"):
        replace(inputs, block_table=inputs.block_table[:2]).run(cpu.paged_attention)


def test_a_nan_of_the_model_stays_visible() -> None:
    """A NaN in a key that is seen spoils the rows that see it and no other one."""
    inputs = build(Case(q_len=4))
    inputs.key_cache[inputs.block_table[0, 1], 2] = float("nan")  # position 18 of row 0, whose queries are at 33 to 36

    spoiled = inputs.run(cpu.paged_attention).isnan().flatten(1)

    assert spoiled.all(1).tolist() == [True, False, False, False]
    assert spoiled.any(1).tolist() == [True, False, False, False]


FORKS = """
import os, torch
from paged_cache.kernels import cpu
from tests.kernels.cases import Case, build
torch.set_num_threads(2)
inputs = build(Case((3000, 3000)))
expected = inputs.run(cpu.paged_attention)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(expected, inputs.run(cpu.paged_attention)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_works_in_a_forked_child() -> None:
    """The threads of the parent are gone in a child: the kernel must not wait for them."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=100)
