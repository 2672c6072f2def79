"""The compiled CPU kernel against the reference in float64, on pools whose unused memory is poisoned."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels.reference import paged_attention as reference
from tests.kernels.cases import Case, Inputs, build
from tests.preloaded import run_script

pytest.importorskip("numba")
cpu = pytest.importorskip("paged_cache.kernels.cpu")

SECONDS = 280  # for a process that compiles, below pytest's own limit
RAGGED = (0, 1, 15, 16, 17, 37, 130, 1000)  # around one block, one tile of 64 tokens, one run of 256
STARTS = (0, 0, 3, 15, 2, 20, 64, 900)
FEATURES = {"window": 24, "chunk": 48, "softcap": 2.0, "sinks": True, "alibi": True, "bias": 8, "starts": STARTS}
PACKED = (0, 1, 3, 0, 17, 5, 70, 200)  # new tokens of the rows of RAGGED
CODES = (torch.int8, torch.float8_e4m3fn)
TOLERANCE = {
    torch.float32: 2e-6,  # sums of up to 1000 terms in another order
    torch.bfloat16: 2**-8,  # half a unit in the last of 8 bits of the output
    torch.float16: 2**-11,  # the same with 11 bits
}
SHAPES = [
    *(Case(RAGGED, group=group) for group in (1, 3, 4, 8)),
    *(Case(RAGGED, head_dim=dim) for dim in (8, 64, 80, 96, 112, 128, 256)),
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
UNPACKED = {name: value for name, value in FEATURES.items() if name != "bias"}
PACKS = [
    *(Case(RAGGED, q_lens=PACKED, group=group) for group in (1, 3, 8)),
    *(Case(RAGGED, q_lens=PACKED, group=3, head_dim=80, **{name: UNPACKED[name]}) for name in UNPACKED),
    Case(RAGGED, q_lens=PACKED, layout="HND", dtype=torch.bfloat16, **UNPACKED),
    Case(RAGGED, q_lens=(0,) * 8),
]
QUANTISED = [
    Case(RAGGED, kv_dtype=kv_dtype, **options)
    for kv_dtype in CODES
    for options in (
        *({"group": group, "head_dim": dim} for group, dim in ((1, 64), (3, 80), (8, 128))),
        *({"layout": layout, "q_len": 9} for layout in ("NHD", "HND", "packed", "head_major", "odd")),
        *({"dtype": dtype, "head_dim": 192, "v_head_dim": 40} for dtype in (torch.bfloat16, torch.float16)),
        {"q_len": 9, **FEATURES},
        {"q_lens": PACKED, **UNPACKED},
    )
]
ONE_BIAS = [Case(RAGGED, q_len=4, bias=1), Case(RAGGED, q_len=4, bias=1, dtype=torch.bfloat16)]


def check(inputs: Inputs, out: torch.Tensor) -> None:
    """`out` is the exact result, up to the rounding of its dtype."""
    exact = inputs.double().run(reference)
    tolerance = TOLERANCE[out.dtype] * inputs.case.gain

    assert exact.shape == out.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", [*SHAPES, *SINGLE, *COMBINED, *DTYPES, *PACKS, *QUANTISED, *ONE_BIAS], ids=str)
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


@pytest.mark.parametrize("kv_dtype", CODES, ids=str)
def test_every_code_is_read_exactly(kv_dtype: torch.dtype) -> None:
    """All 256 bit patterns of 8 bits, subnormals and NaN included."""
    values = torch.arange(256, dtype=torch.uint8).view(kv_dtype).view(4, 1, 1, 64)
    table, scales = torch.arange(4, dtype=torch.int32)[:, None], torch.tensor([1.0, 0.5, 2.0, 3.0]).view(4, 1, 1)
    ones = torch.ones(4, dtype=torch.int32)
    keys = torch.zeros(4, 1, 1, 64, dtype=torch.int8).view(kv_dtype)

    out = cpu.paged_attention(
        torch.ones(4, 1, 1, 64), keys, values, table, ones, scale=1.0, key_scales=scales, value_scales=scales
    )

    torch.testing.assert_close(out, values.float() * scales[..., None], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_queries_and_cache_may_differ(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Queries and keys may differ in dtype; the output has that of the queries."""
    inputs = build(Case(RAGGED, dtype=kv_dtype, q_len=9))
    inputs = replace(inputs, query=inputs.query.to(dtype))

    check(inputs, inputs.run(cpu.paged_attention))


@pytest.mark.parametrize("length", [700, 1500])
def test_a_bias_may_be_shorter_or_longer_than_the_table(length: int) -> None:
    """A bias of any length that holds the longest row, with any strides of the other dimensions."""
    inputs = build(Case((3, 700, 96), q_len=4, spare_blocks=9))
    bias = torch.full((length, 8, 4, 1), float("nan")).permute(3, 1, 2, 0)
    bias[..., :700] = torch.randn(1, 8, 4, 700)
    inputs = replace(inputs, extras={"position_bias": bias})

    check(inputs, inputs.run(cpu.paged_attention))


@pytest.mark.parametrize("options", [{}, {"q_len": 9}, {"q_lens": PACKED}, {"kv_dtype": torch.int8}], ids=str)
def test_does_not_depend_on_where_blocks_lie(options: dict) -> None:
    """Bit-equal after all blocks were moved to other places."""
    inputs = build(Case(RAGGED, **options))
    order = torch.randperm(inputs.key_cache.shape[0])
    table = torch.where(inputs.block_table < 0, -1, order.argsort().int()[inputs.block_table.clamp(min=0)])
    moved = replace(
        inputs,
        key_cache=inputs.key_cache[order],
        value_cache=inputs.value_cache[order],
        block_table=table.int(),
        extras={name: x[order] if name.endswith("scales") else x for name, x in inputs.extras.items()},
    )

    assert torch.equal(inputs.run(cpu.paged_attention), moved.run(cpu.paged_attention))


@pytest.mark.parametrize("q_len", [1, 9, 300])
def test_does_not_depend_on_the_batch_or_the_threads(q_len: int) -> None:
    """Bit-equal alone, in a batch, with any number of threads and so with any number of heads per item."""
    inputs = build(Case((1000, 300, 317, 5000), q_len=q_len, num_kv_heads=4, group=2))
    together = inputs.run(cpu.paged_attention)
    threads = torch.get_num_threads()
    try:
        for other in (1, 2, 7):
            torch.set_num_threads(other)
            assert torch.equal(together, inputs.run(cpu.paged_attention))
            for row in range(4):
                one = slice(row, row + 1)
                alone = replace(
                    inputs, query=inputs.query[one], block_table=inputs.block_table[one], seq_lens=inputs.seq_lens[one]
                )

                assert torch.equal(together[one], alone.run(cpu.paged_attention))
    finally:
        torch.set_num_threads(threads)


def test_packed_rows_are_those_of_the_padded_form() -> None:
    """Bit-equal: rows of equal length, packed or not."""
    inputs = build(Case((1000, 300, 17), q_len=9))
    packed = replace(
        inputs,
        query=inputs.query.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2),
        extras={"cu_seqlens_q": torch.arange(0, 28, 9, dtype=torch.int32)},
    )

    out = cpu.paged_attention(
        packed.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.block_table,
        inputs.seq_lens,
        **packed.options | {"max_q_len": 9},
    )

    assert torch.equal(inputs.run(cpu.paged_attention).flatten(0, 1), out[0])


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


def guard(folder: Path, *arguments: str) -> tuple[int | None, str, str]:
    """Run `cpu_guard_pages.py` in a process of its own."""
    pytest.importorskip("triton")  # guard_pages.py is shared with the tests of its kernels
    return run_script(Path(__file__).with_name("cpu_guard_pages.py"), folder, *arguments, timeout=SECONDS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect of the C library")
@pytest.mark.parametrize("side", ["front", "back"])
def test_touches_nothing_outside_its_tensors(side: str, tmp_path: Path) -> None:
    """No SIGSEGV with unmapped memory right before or behind all tensors, and one with a wrong block id."""
    status, output, errors = guard(tmp_path, side)

    assert status == 0, output + errors
    assert output.count("right") == 6
    assert guard(tmp_path, side, "wrong-block")[0] == -signal.SIGSEGV


COMPILES = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from paged_cache.kernels import cpu
from tests.kernels.cases import Case, build
build(Case(dtype=torch.bfloat16)).run(cpu.paged_attention)
"""


def test_compiling_is_announced_and_kept(tmp_path: Path) -> None:
    """The first process says that it compiles before it does; the next one finds the kernel on the disk."""
    script = tmp_path / "script.py"
    script.write_text(COMPILES, encoding="utf-8")
    (_, _, first), (status, _, second) = (
        run_script(script, tmp_path, timeout=SECONDS, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)
    )

    assert re.search(r"Compiling .* torch.bfloat16 .*\n.*Compiled", first)
    assert status == 0, second
    assert "ompil" not in second


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_works_in_a_forked_child() -> None:
    """The threads of the parent are gone in a child: the kernel must not wait for them."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=100)
