"""The attention kernel's machine code, compiled through the public function without a GPU.

What the interpreter cannot show: that the kernels compile, that registers and shared memory suffice, that keys and values
are loaded 16 bytes at a time while the step before is computed, and how many instructions they cost. The last is compared
with aot_table.json, which `python -m tests.kernels.test_aot` writes anew.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from paged_cache.kernels.triton import attention, config, plan  # noqa: E402  triton may be missing
from tests.kernels import aot  # noqa: E402
from tests.kernels.cases import Case, Inputs, build  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not aot.have_tools(), reason="this Triton does not bring cuobjdump and nvdisasm"),
    pytest.mark.skipif(attention.INTERPRETED, reason="TRITON_INTERPRET replaces the compiler"),
]

TABLE = Path(__file__).with_name("aot_table.json")
SHARED = {80: 99 * 1024, 90: 227 * 1024}  # bytes of a program: 8.6 and 8.9 have less than 8.0, and run the same tiles
STACK = {80: 64, 90: 0}  # bytes of a thread
MODEL = {"window": 1024, "softcap": 30.0, "sinks": True}
LLAMA = Case(lens=(64, 1000), num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, block_size=64)
PROMPT = replace(LLAMA, q_len=64, num_splits=1)
LATENT = {"head_dim": 192, "v_head_dim": 128}
CASES = {
    "llama": LLAMA,
    "small blocks": replace(LLAMA, block_size=16, layout="packed"),
    "drafts": replace(LLAMA, q_len=8),
    "prompt": PROMPT,
    "prompt, model's features": replace(PROMPT, **MODEL),
    "all features": replace(LLAMA, **MODEL, chunk=2048, alibi=True, bias=1, starts=(3, 0)),
    "int8": replace(LLAMA, kv_dtype=torch.int8, **MODEL),
    "e4m3": replace(LLAMA, kv_dtype=torch.float8_e4m3fn),
    "e4m3 prompt": replace(PROMPT, kv_dtype=torch.float8_e4m3fn),
    "head dim 80": replace(LLAMA, head_dim=80, dtype=torch.float16),
    "head dim 256": replace(LLAMA, head_dim=256),
    "head dim 256 prompt": replace(PROMPT, head_dim=256, **MODEL),
    "key 192, value 128": replace(LLAMA, **LATENT),
    "key 192, value 128 prompt": replace(PROMPT, **LATENT),
    "float32": replace(LLAMA, dtype=torch.float32),
}

INT8_PROMPT = replace(PROMPT, kv_dtype=torch.int8)
TIGHT = [  # what comes closest to using up the registers: case, dtype of the query, compute capability
    *((replace(LLAMA, head_dim=256, kv_dtype=torch.int8), torch.float32, capability) for capability in (80, 90)),
    *((LLAMA, torch.float32, capability) for capability in (80, 90)),
    (replace(INT8_PROMPT, **LATENT), torch.bfloat16, 80),
    (replace(INT8_PROMPT, head_dim=256), torch.bfloat16, 90),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A compilation cache of this module's own."""
    path = tmp_path_factory.mktemp("triton")
    with mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(path)):
        yield path


@contextmanager
def pretending(case: Case, capability: int) -> Iterator[None]:
    """A GPU of a compute capability, and a plan that splits keys unless the case says otherwise."""
    with (
        mock.patch.object(config, "machine", return_value=(capability, 132)),
        mock.patch.object(attention, "_device_problem", return_value=None),
        mock.patch.object(plan.Shape, "_budget", return_value=(0 if case.num_splits == 1 else 8, 64)),
    ):
        yield


def launch(inputs: Inputs, capability: int) -> None:
    """The call that a GPU would get."""
    with pretending(inputs.case, capability):
        inputs.run(attention.paged_attention)


def tiles(case: Case, capability: int) -> config.Config:
    """What the launcher chooses."""
    num_rows = min(config.MAX_ROWS, triton.next_power_of_2(case.q_len * case.group))
    dims = case.head_dim, case.v_head_dim or case.head_dim
    return config.choose(num_rows, *dims, case.dtype, case.kv_dtype or case.dtype, capability)


def instructions_per_kib(machine: aot.Machine, case: Case, tile: int) -> float:
    """Instructions of the main loop, all warps counted, per KiB of keys and values."""
    size = tile * (case.head_dim + (case.v_head_dim or case.head_dim)) * (case.kv_dtype or case.dtype).itemsize
    return round(len(machine.loop) * machine.num_warps / (size / 1024), 1)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_compiles_to_good_code(name: str, capability: int, folder: Path) -> None:
    """Nothing is spilled in the loop, memory suffices, K and V come in 16-byte loads ahead of their use."""
    case = CASES[name]
    cut = tiles(case, capability)
    planner, attend, *merge = aot.machine_code(lambda: launch(build(case), capability), capability, folder)
    assert [x.name for x in (planner, attend)] == ["_plan_kernel", "attend_kernel"]
    assert [x.name for x in merge] == ([] if case.num_splits == 1 else ["merge_kernel"])

    assert all(machine.stack == machine.local == 0 for machine in (planner, *merge))
    assert attend.stack <= STACK[capability]
    assert attend.local == attend.count_in_loop("LDL|STL") == 0
    assert attend.shared <= SHARED[capability]

    pads = [triton.next_power_of_2(dim) for dim in (case.head_dim, case.v_head_dim or case.head_dim)]
    size = cut.tile * sum(pads) * (case.kv_dtype or case.dtype).itemsize
    assert attend.count_in_loop(r"LDGSTS\b.*\.128") == size // (16 * 32 * cut.num_warps)
    assert attend.count_in_loop(r"LDG\b.*\.(U8|S8)") == attend.count_in_loop(r"LDS\b.*\.(U8|S8)") == 0
    for pad in pads:
        assert attend.ttgir.count(f"!ttg.memdesc<1x{cut.tile}x{pad}x") == 0  # one buffer: loads wait for arithmetic
        assert attend.ttgir.count(f"x{cut.tile}x{pad}x") > 0

    warp_group = capability == 90 and cut.rows >= 64
    kind = "FFMA" if case.dtype == torch.float32 else "HGMMA" if warp_group else "HMMA"
    assert attend.count_in_loop(kind) > 0

    table = json.loads(TABLE.read_text())
    if triton.__version__ == table["triton"]:  # others compile differently
        wanted = table["instructions per KiB of keys and values"][f"{name}, sm_{capability}"]
        assert 0.9 * wanted <= instructions_per_kib(attend, case, cut.tile) <= 1.1 * wanted


@pytest.mark.parametrize(("case", "query_dtype", "capability"), TIGHT, ids=str)
def test_nothing_is_spilled(case: Case, query_dtype: torch.dtype, capability: int, folder: Path) -> None:
    """Where the cache becomes a wider dtype on its way, that takes registers."""
    inputs = build(case)
    inputs = replace(inputs, query=inputs.query.to(query_dtype))
    attend = aot.machine_code(lambda: launch(inputs, capability), capability, folder)[1]
    assert attend.name == "attend_kernel"
    assert attend.count_in_loop("FFMA" if query_dtype == torch.float32 else "HMMA") > 0
    assert attend.stack == attend.local == 0
    assert attend.shared <= SHARED[capability]


def test_other_lengths_and_tables_do_not_recompile(folder: Path) -> None:
    """A longer table, another number of items, window or new tokens are the same kernels."""
    changes = ({}, {"window": 17}, {"window": 1}, {"spare_blocks": 3}, {"q_len": 3}, {"lens": (700, 3, 9)})
    with aot.compile_only(90) as kernels:
        for change in changes:
            launch(build(replace(LLAMA, **{"window": 16, **change})), 90)
    hashes = {name: {x.hash for x in kernels if x.metadata.name == name} for name in {x.metadata.name for x in kernels}}
    assert {name: len(x) for name, x in hashes.items()} == {"_plan_kernel": 1, "attend_kernel": 1, "merge_kernel": 1}


def test_the_host_reads_no_lengths(folder: Path) -> None:
    """The launcher works on a table and lengths without data: nothing waits for the device, a graph stays right."""
    inputs = build(LLAMA)
    no_data = {name: getattr(inputs, name).to("meta") for name in ("block_table", "seq_lens")}
    with aot.compile_only(90) as kernels, mock.patch.object(attention, "check_shapes"):
        launch(replace(inputs, **no_data), 90)
    assert len(kernels) == 3


def write_table() -> None:
    """Measure all cases anew."""
    with TemporaryDirectory() as path, mock.patch.dict("os.environ", TRITON_CACHE_DIR=path):
        numbers = {}
        for name, case in CASES.items():
            for capability in (80, 90):
                machines = aot.machine_code(lambda: launch(build(case), capability), capability, Path(path))  # noqa: B023
                tile = tiles(case, capability).tile
                numbers[f"{name}, sm_{capability}"] = instructions_per_kib(machines[1], case, tile)
    table = {"triton": triton.__version__, "instructions per KiB of keys and values": numbers}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    write_table()
