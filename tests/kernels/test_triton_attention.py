"""The Triton attention kernel where there is no GPU: under Triton's interpreter, and what needs no kernel to run."""

import signal
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

from paged_cache.kernels.triton import attention  # noqa: E402  triton may be missing
from tests.kernels import interpreter  # noqa: E402
from tests.kernels.cases import Case, build  # noqa: E402

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SIDES = ["front", "back"]

old_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="this Triton's interpreter cannot loop to a runtime bound with numpy 2.4 (triton #9171)",
)


@old_interpreter
def test_equals_the_reference_under_the_interpreter() -> None:
    """All tests of on_device/, on CPU tensors."""
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = interpreter.interpret("-m", "pytest", *options, str(HERE / "on_device"))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, interpreter.Outcome]:
    """The kernels under the interpreter, with unmapped memory around every tensor."""
    jobs = [f"{side}{mistake}" for side in SIDES for mistake in ("", ",wrong-block")]
    return interpreter.outcomes(HERE / "guard_pages.py", jobs)


@old_interpreter
@pytest.mark.parametrize("side", SIDES)
def test_touches_nothing_outside_its_tensors(side: str, outcomes: dict[str, interpreter.Outcome]) -> None:
    """With unmapped memory right before (behind) every tensor, the kernels run to the end."""
    assert outcomes[side].status == 0, outcomes[side]
    assert outcomes[side].stdout.startswith("right")


@old_interpreter
@pytest.mark.parametrize("side", SIDES)
def test_the_guard_pages_catch_a_wrong_block(side: str, outcomes: dict[str, interpreter.Outcome]) -> None:
    """The test above can fail: one used table entry just outside the pool, and the process dies of it."""
    done = outcomes[f"{side},wrong-block"]
    assert done.status == -signal.SIGSEGV, done


def test_refuses_cpu_tensors_unless_interpreted() -> None:
    """A call for the reference or the CPU kernel."""
    inputs = build(Case())
    assert "not on a CUDA device" in attention.supports(inputs.query, inputs.key_cache, inputs.value_cache)
