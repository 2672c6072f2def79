"""Each subcommand that the Markdown names runs, tiny: on the model in the package, or on random weights.

`test_commands.py` reads the arguments of every command on the pages and stops there, since what the pages ask for takes minutes to
hours, or needs a GPU, another environment or the network: `bench` without `--quick`, models of the hub, `--device cuda`, `--peer`,
`make bench-gpu`, `pip`, `git`. Here the same subcommands do their work, with `--quick` and less of everything. Only read are those in
`RUN_ELSEWHERE`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from paged_cache.assets import MODEL_PATH
from paged_cache.bench.results import Results
from paged_cache.cli import app
from tests.docs.pages import ROOT
from tests.docs.test_commands import commands

SHORT = ["--quick", "--output-json", "found.json"]
TINY = [*SHORT, "--model", "tiny"]


def has_results(_: str) -> None:
    """A file of results with samples of ours, and with no wrong answer."""
    found = Results.load(Path("found.json"))
    mine = [line for line in found.lines if line.candidate in found.ours]

    assert any(samples for line in mine for samples in line.metrics.values()), found.lines
    assert not [line.note for line in mine if "token" in line.note]


def has_files(*names: str) -> Callable[[str], None]:
    """These were written, and are not empty."""

    def check(_: str) -> None:
        assert all(Path("out", name).stat().st_size > 100 for name in names)

    return check


def has_a_plan(output: str) -> None:
    """The answer in JSON, with blocks in it."""
    assert json.loads(output)["num_blocks"] > 0


def has_a_report(_: str) -> None:
    """The file has a chapter."""
    assert "## offload" in Path("out.md").read_text(encoding="utf-8")


SLOW = pytest.mark.slow
# Subcommand, options, what has to be there.
RUNS = [
    pytest.param("demo", ["--max-new-tokens", "4", "--output", "out"], has_files("pool.html"), id="demo"),
    pytest.param(
        "compare",
        ["--quick", "--no-concurrency", "--output", "out"],
        has_files("compare.json", "compare.html"),
        id="compare",
        marks=SLOW,
    ),
    pytest.param("plan", [str(MODEL_PATH), "--memory", "1GiB", "--json"], has_a_plan, id="plan"),
    pytest.param("bench decode", TINY, has_results, id="decode"),
    pytest.param("bench latency", TINY, has_results, id="latency", marks=SLOW),
    pytest.param("bench throughput", [*TINY, "--only", "loop,sjf"], has_results, id="throughput", marks=SLOW),
    pytest.param("bench serve", TINY, has_results, id="serve", marks=SLOW),
    pytest.param("bench scheduling", SHORT, has_results, id="scheduling", marks=SLOW),
    pytest.param("bench report", ["results", "--output", "out.md"], has_a_report, id="report"),
]


# What these tests leave to others.
RUN_ELSEWHERE = {"bench kernels": "tests/bench/test_kernels_bench.py", "bench startup": "tests/bench/test_steps.py"}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what commands write."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "benchmarks" / "results" / "offload.json", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("subcommand", "options", "check"), RUNS)
def test_commands_do_their_work(
    subcommand: str, options: list[str], check: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The subcommand ends well and leaves what it promises: samples, pictures, pages, a plan."""
    with pytest.raises(SystemExit) as end:
        typer.main.get_command(app).main([*subcommand.split(), *options], prog_name="paged-cache")

    assert not end.value.code
    check(capsys.readouterr().out)


def test_every_subcommand_is_run() -> None:
    """What the pages name is in the table above, or has a test of its own somewhere else."""
    words = [command.words[1:] for command in commands("paged-cache") if not command.words[1].startswith("-")]
    named = {" ".join(found[: 2 if found[0] == "bench" else 1]) for found in words}
    run = {str(parameters.values[0]) for parameters in RUNS}

    assert named <= run | RUN_ELSEWHERE.keys(), named - run
    assert all((ROOT / place).is_file() for place in RUN_ELSEWHERE.values())
