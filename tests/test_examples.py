"""Every example is short, and runs as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.preloaded import run_script

# Folders inside examples/ hold longer programs, which are not run here.
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 60
TIMEOUT = 240  # seconds, below pytest's own limit, so that the output is shown


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """It ends well, without a network, and prints something."""
    status, output, errors = run_script(path, tmp_path, timeout=TIMEOUT)

    assert status == 0, output + errors
    assert output.strip()


def test_an_example_from_the_shell(tmp_path: Path) -> None:
    """One of them also in an interpreter that has imported nothing, away from the checkout, until that has ended."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "default"}
    command = [sys.executable, str(ROOT / "examples" / "observability.py")]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.strip()


def test_an_example_that_fails_is_noticed(tmp_path: Path) -> None:
    """Its status is that of any interpreter, and what it said is there to be read."""
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('so far')\nraise ValueError(sys.argv[1])", encoding="utf-8")
    status, output, errors = run_script(script, tmp_path, "badly", timeout=TIMEOUT)

    assert status == 1
    assert output == "so far\n"
    assert errors.endswith("ValueError: badly\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    """A reader sees it on one screen."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_page_on_kernels_is_right() -> None:
    """Its example attends to the tokens that it wrote: what the packed prompt gets is what SDPA gives, also from 8 bits."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code.replace("# 8 bits", "full = out\n# 8 bits"), names)

    group = names["num_heads"] // names["num_kv_heads"]
    keys, values = (x[:20].repeat_interleave(group, 1).transpose(0, 1) for x in names["new"])
    prompt = torch.nn.functional.scaled_dot_product_attention(names["query"][0, :, :20], keys, values, is_causal=True)
    torch.testing.assert_close(names["full"][0, :20], prompt.transpose(0, 1))
    torch.testing.assert_close(names["out"][0, :20], prompt.transpose(0, 1), atol=0.05, rtol=0)
    assert not torch.equal(names["out"], names["full"])
    for source, copy in ((5, 6), (7, 8)):
        assert torch.equal(names["keys"][source], names["keys"][copy])
        assert names["keys"][copy].any()
