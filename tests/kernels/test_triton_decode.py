"""The Triton decode kernel where there is no GPU: under Triton's interpreter, and what needs no kernel to run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

from paged_cache.kernels import triton_decode  # noqa: E402  triton may be missing
from tests.kernels.cases import Case, build  # noqa: E402

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

old_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="this Triton's interpreter cannot loop to a runtime bound with numpy 2.4 (triton #9171)",
)


def interpret(*args: str) -> subprocess.CompletedProcess[str]:
    """Run Python under TRITON_INTERPRET: it is read when a kernel is defined, so this takes a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )


@old_interpreter
def test_equals_the_reference_under_the_interpreter() -> None:
    """All tests of on_device/, on CPU tensors."""
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = interpret("-m", "pytest", *options, str(HERE / "on_device"))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@old_interpreter
@pytest.mark.parametrize("side", ["front", "back"])
def test_touches_nothing_outside_its_tensors(side: str) -> None:
    """With unmapped memory right before (behind) every tensor, the kernels run to the end."""
    done = interpret(str(HERE / "guard_pages.py"), side)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("right")


@old_interpreter
@pytest.mark.parametrize("side", ["front", "back"])
def test_the_guard_pages_catch_a_wrong_block(side: str) -> None:
    """The test above can fail: one used table entry just outside the pool, and the process dies of it."""
    done = interpret(str(HERE / "guard_pages.py"), side, "wrong-block")
    assert done.returncode == -11, done.stdout + done.stderr


def test_refuses_cpu_tensors_unless_interpreted() -> None:
    """A call for the reference or the CPU kernel."""
    inputs = build(Case())
    assert "not on a CUDA device" in triton_decode.supports(inputs.query, inputs.key_cache, inputs.value_cache)


@pytest.mark.parametrize(
    ("programs", "longest", "expected"),
    [
        pytest.param(8, 64, 1, id="one tile is not split"),
        pytest.param(8, 1024, 16, id="batch 1, short: a tile each"),
        pytest.param(8, 32768, 50, id="batch 1, long: as many as the GPU holds"),
        pytest.param(8, 131072, 64, id="batch 1, very long: none above 2048 keys"),
        pytest.param(64, 32768, 16, id="batch 8, long"),
        pytest.param(512, 1024, 1, id="batch 64 fills the GPU by itself"),
        pytest.param(512, 32768, 8, id="batch 64, but one row may be the tail"),
        pytest.param(2048, 0, 1, id="a table without columns"),
    ],
)
def test_splits_fill_the_gpu(programs: int, longest: int, expected: int) -> None:
    """The number of splits on an H200 (132 multiprocessors) with 8 KV heads."""
    num_splits, min_split = triton_decode._splits(programs, longest, 132)
    assert num_splits == expected
    assert num_splits == 1 or num_splits * min_split < longest + min_split
