"""Every example is short, and runs as a reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Folders inside examples/ hold longer programs, which are not run here.
EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
LONGEST = 60
TIMEOUT = 240  # seconds, below pytest's own limit, so that the output is shown


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """It ends well, away from the checkout and without a network, and prints something."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "default"}
    result = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    """A reader sees it on one screen."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
