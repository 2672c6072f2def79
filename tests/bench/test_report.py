"""The report of a folder, and the command that fills one."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paged_cache.bench import report, suite
from paged_cache.bench.results import Goal, Line, Results
from paged_cache.cli import app
from paged_cache.errors import InvalidRequestError

pytestmark = pytest.mark.slow  # says nothing about the installed transformers

TIME = "elapsed_time"


def make(name, ratio):
    """A benchmark with a goal of half the time."""
    lines = [Line({"batch": 1}, "peer", {TIME: [1.0, 2.0]}), Line({"batch": 1}, "ours", {TIME: [ratio, 2 * ratio]})]
    goals = [Goal("half the time", TIME, "ours", "peer", at_most=0.5)]
    environment = {
        "device": "a machine",
        "load": 3.0,
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "date": "2026-01-02",
    }
    parts = {"columns": [TIME], "compared": [TIME], "ours": ["ours"], "lines": lines, "goals": goals}
    return Results(
        name, f"Title of {name}", f"paged-cache bench {name}", environment, {"rounds": 2, "rate": None}, **parts
    )


@pytest.fixture
def folder(tmp_path):
    """Two results, and two files that are something else."""
    for name, ratio in (("one", 0.4), ("two", 0.6)):
        make(name, ratio).save(tmp_path / "in" / f"{name}.json")
    (tmp_path / "in" / "old.json").write_text('{"rounds": []}', encoding="utf-8")
    (tmp_path / "in" / "half.json").write_text('{"format": 1, "na', encoding="utf-8")
    return tmp_path / "in"


def test_the_report_has_everything(folder, tmp_path):
    """Contents, goals, and for each benchmark title, command, table, picture, settings, environment and warning."""
    text = report.write(folder, tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    assert "- [one](#one): Title of one" in text
    assert "1 of 2 goals are met" in text
    assert "| [two](#two) | half the time | at most 0.50 | 0.60 | batch 1 | **MISSED** |" in text
    for name in ("one", "two"):
        assert f"## {name}\n\nTitle of {name}.\n\n```\npaged-cache bench {name}\n```" in text
        assert f"(../in/{name}.json)" in text
    assert "| peer | elapsed time, s | 0.60 | 1.67 x faster |" in text
    assert "Settings: rounds `2`." in text
    assert "a machine" in text
    assert "torch 2.13.0, commit abc, 2026-01-02" in text
    assert "WARNING: other jobs kept this machine busy (load 3)" in text


def test_foreign_files_are_listed(folder, tmp_path):
    """Not passed over in silence."""
    text = report.write(folder, tmp_path / "report.md").read_text(encoding="utf-8")

    for name in ("old", "half"):
        assert f"- {name}.json: is no file of results in format 1." in text


def test_pictures(folder, tmp_path):
    """They are drawn beside the report, unless there is one beside the JSON file."""
    pytest.importorskip("matplotlib")
    (folder / "two.png").write_bytes(b"its own")
    text = report.write(folder, tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    assert "![Title of one](report/one.png)" in text
    assert "![Title of two](../in/two.png)" in text
    assert (tmp_path / "out" / "report" / "one.png").stat().st_size > 5000
    assert not (tmp_path / "out" / "report" / "two.png").exists()


def test_without_matplotlib(folder, tmp_path, monkeypatch):
    """The report says why it has no pictures."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = report.write(folder, tmp_path / "report.md").read_text(encoding="utf-8")

    assert "matplotlib is not installed" in text
    assert "![" not in text


def test_a_folder_without_results(tmp_path):
    """Is an error that names it, and nothing is written."""
    with pytest.raises(InvalidRequestError, match=tmp_path.name):
        report.write(tmp_path, tmp_path / "report.md")
    assert not list(tmp_path.iterdir())


def test_the_command(folder, tmp_path):
    """`paged-cache bench report FOLDER` writes into the folder, or where it is told to."""
    runner = CliRunner()
    for arguments, path in (([], folder / "report.md"), (["--output", str(tmp_path / "r.md")], tmp_path / "r.md")):
        result = runner.invoke(app, ["bench", "report", str(folder), *arguments])
        assert (result.exit_code, path.exists()) == (0, True), result.output
    (tmp_path / "empty").mkdir()
    result = runner.invoke(app, ["bench", "report", str(tmp_path / "empty")])
    assert result.exit_code == 1
    assert "has no results" in result.stderr


def test_names_of_benchmarks():
    """By command or by file; long ones only if there is time or they are asked for; no others."""
    names = lambda *only, quick=False: [run.name for run in suite.chosen(only, quick)]  # noqa: E731

    assert names() == [run.name for run in suite.RUNS if not run.needs_peers]
    assert names("throughput") == ["throughput", "throughput_192"]
    assert names("decode") == ["decode_28m", "decode_shipped", "decode_layers"]
    assert names("throughput", quick=True) == ["throughput"]
    assert names("throughput_192", quick=True) == ["throughput_192"]
    assert "throughput_192" not in names(quick=True)
    with pytest.raises(InvalidRequestError, match=r"no benchmark speed; there are decode, decode_28m"):
        suite.chosen(["speed", "decode"], False)


def test_vllm_takes_part_where_it_is():
    """With an interpreter for it there is a benchmark more, with a model that it takes; without one, asking is refused."""
    with_vllm = {run.name: run for run in suite.chosen([], True, has_peers=True)}
    quick = suite.arguments(with_vllm["throughput_vllm"], Path("out"), True, Path("python"))

    assert with_vllm.keys() - {run.name for run in suite.chosen([], True)} == {"throughput_vllm"}
    assert quick[quick.index("--model") + 1] == "28m"
    assert "--model" not in suite.arguments(with_vllm["throughput_vllm"], Path("out"), False, Path("python"))
    with pytest.raises(InvalidRequestError, match="throughput_vllm needs vLLM: give --peer-python"):
        suite.chosen(["throughput_vllm"], False)


def test_arguments_exist(tmp_path):
    """Every command is there and takes what it would be given, also a peer's interpreter."""
    runner = CliRunner()
    for run in suite.RUNS:
        for is_quick in (False, True):
            given = suite.arguments(run, tmp_path, is_quick, tmp_path / "python")
            known = runner.invoke(app, ["bench", run.command[0], "--help"], env={"COLUMNS": "200"}).output
            assert "--output-json" in given
            for option in (x for x in given if x.startswith("--")):
                assert option in known, (run.name, option)
            assert ("--peer-python" in given) == run.has_peers


@pytest.fixture
def commands(monkeypatch):
    """Instead of benchmarks: one that writes results and one that fails after saying why."""
    good = "import sys; from pathlib import Path; Path(sys.argv[-1]).write_text({text!r}); print('fine')"
    bad = "import sys; print('it broke'); sys.exit(3)"
    monkeypatch.setattr(suite, "RUNS", (suite.Run("bad", ("bad",)), suite.Run("good", ("good",))))
    real, called = suite.subprocess.run, []

    def run(command, **options):
        called.append(command[4])
        text = json.dumps(json.loads(commands_text.read_text(encoding="utf-8")))
        code = bad if command[4] == "bad" else good.format(text=text)
        return real([sys.executable, "-c", code, command[-1]], **options)

    commands_text = None

    def use(path):
        nonlocal commands_text
        commands_text = path
        return called

    monkeypatch.setattr(suite.subprocess, "run", run)
    return use


def test_all_goes_on_when_one_fails(folder, tmp_path, commands):
    """The others are run, the report is written, the failure is shown with its output, and the exit code is 1."""
    called = commands(folder / "one.json")
    output = tmp_path / "out"
    output.mkdir()
    (output / "bad.json").write_text("of an earlier run", encoding="utf-8")
    result = CliRunner().invoke(app, ["bench", "all", "--quick", "--output-dir", str(output)])

    assert called == ["bad", "good"]
    assert result.exit_code == 1
    assert "it broke" in result.stderr
    assert "exit code 3" in result.stderr
    assert "failed: bad" in result.stderr
    assert "Title of one" in (output / "report.md").read_text(encoding="utf-8")
    assert not (output / "bad.json").exists()
    assert (output / "good.log").read_text(encoding="utf-8") == "fine\n"


def test_all_that_is_wanted(folder, tmp_path, commands):
    """`--only` leaves out the others; without failures the exit code is 0."""
    called = commands(folder / "one.json")
    result = CliRunner().invoke(app, ["bench", "all", "--only", "good", "--output-dir", str(tmp_path / "out")])

    assert (result.exit_code, called) == (0, ["good"]), result.output
    wrong = CliRunner().invoke(app, ["bench", "all", "--only", "nothing", "--output-dir", str(tmp_path / "out")])
    assert wrong.exit_code == 1
    assert "There is no benchmark nothing" in wrong.stderr
