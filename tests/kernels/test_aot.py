"""The Triton kernels' machine code, compiled through the real launcher without a GPU.

What the interpreter cannot show: that the kernels compile, that registers and shared memory suffice, that keys and values
are loaded 16 bytes at a time while the step before is computed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from paged_cache.kernels import triton_decode  # noqa: E402  triton may be missing
from tests.kernels import aot  # noqa: E402
from tests.kernels.cases import Case, build  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not aot.have_tools(), reason="this Triton does not bring cuobjdump and nvdisasm"),
    pytest.mark.skipif(triton_decode.INTERPRETED, reason="TRITON_INTERPRET replaces the compiler"),
]

SMALLEST_SHARED = 99 * 1024  # bytes that a program may have on compute capability 8.6 and 8.9, the least of all
FEATURES = {"window": 1024, "chunk": 2048, "softcap": 30.0, "sinks": True}
LLAMA = Case(lens=(64, 1000), num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, num_splits=8)
CASES = {
    "llama": LLAMA,
    "one split": replace(LLAMA, num_splits=1),
    "all features, packed pool": Case(head_dim=64, dtype=torch.bfloat16, layout="packed", num_splits=8, **FEATURES),
    "head dim 80": Case(head_dim=80, dtype=torch.float16, num_splits=8),
    "head dim 256": Case(head_dim=256, dtype=torch.bfloat16, num_splits=8),
    "key 192, value 128": Case(head_dim=192, v_head_dim=128, dtype=torch.bfloat16, num_splits=8),
    "16 tokens": Case(head_dim=128, q_len=16, dtype=torch.bfloat16, num_splits=8),
    "float32": Case(head_dim=128, num_splits=8),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A compilation cache of this module's own."""
    path = tmp_path_factory.mktemp("triton")
    with mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(path)):
        yield path


def launch(case: Case) -> None:
    """The call that a GPU would get."""
    with mock.patch.object(triton_decode, "_splits", return_value=(case.num_splits, 64)):
        build(case).run(triton_decode._launch)


@pytest.mark.parametrize(
    ("name", "capability"), [(name, 90) for name in CASES] + [(name, 80) for name in ("llama", "16 tokens", "float32")]
)
def test_compiles_to_good_code(name: str, capability: int, folder: Path) -> None:
    """No register is spilled, shared memory suffices everywhere, and all K and V come in 16-byte loads."""
    case = CASES[name]
    attend, *merge = aot.machine_code(lambda: launch(case), capability, folder)
    assert [x.name for x in merge] == (["_merge_kernel"] if case.num_splits > 1 else [])
    for machine in (attend, *merge):
        assert machine.stack == machine.local == 0
    if capability == 80:
        assert attend.shared <= SMALLEST_SHARED
    assert attend.count(r"LDGSTS\b.*\.128") == attend.count(r"LDGSTS\b") > 0
    if name == "llama":
        # Two buffers each: loads overlap arithmetic. With block ids loaded in the step that needs them, there is one.
        assert attend.ttgir.count("!ttg.memdesc<2x64x128xbf16") >= 2


def test_other_lengths_and_tables_do_not_recompile(folder: Path) -> None:
    """A longer table, another number of splits, window or new tokens are the same kernels."""
    with aot.compile_only(90) as kernels:
        for change in ({}, {"num_splits": 5}, {"window": 17}, {"window": 1}, {"spare_blocks": 3}, {"q_len": 3}):
            launch(replace(LLAMA, **{"window": 16, **change}))
    assert len({kernel.hash for kernel in kernels if kernel.metadata.name == "_attend_kernel"}) == 1
    assert len({kernel.hash for kernel in kernels if kernel.metadata.name == "_merge_kernel"}) == 1


def test_the_host_reads_no_lengths(folder: Path) -> None:
    """The launcher works on a table and lengths without data: nothing waits for the device, a graph stays right."""
    inputs = build(LLAMA)
    no_data = {name: getattr(inputs, name).to("meta") for name in ("block_table", "seq_lens")}
    with aot.compile_only(90) as kernels:
        replace(inputs, **no_data).run(triton_decode._launch)
    assert kernels
