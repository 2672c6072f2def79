"""The Triton attention kernel where there is no GPU: under Triton's interpreter, and what needs no kernel to run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

from paged_cache.kernels.triton import attention  # noqa: E402  triton may be missing
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
    assert "not on a CUDA device" in attention.supports(inputs.query, inputs.key_cache, inputs.value_cache)
