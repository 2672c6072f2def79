"""Runs Python under Triton's interpreter, in a process of its own: the variable is read when a kernel is defined."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit status, or minus the signal that ended it, and what it printed."""

    status: int
    stdout: str
    stderr: str  # of all children


def interpret(*args: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )


def outcomes(script: Path, jobs: list[str]) -> dict[str, Outcome]:
    """What became of each job of a script that ends in `guard_pages.run_jobs`."""
    done = interpret(str(script), *jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^== (.+): (-?\d+)\n", done.stdout, flags=re.MULTILINE)
    each = zip(parts[1::3], parts[2::3], parts[::3], strict=False)
    return {job: Outcome(int(status), stdout, done.stderr) for job, status, stdout in each}
