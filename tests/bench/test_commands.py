"""What commands say about themselves, and what a quick run does not claim."""

import re

import pytest
import typer.main
from typer.testing import CliRunner

from paged_cache.bench.results import Goal, Line, Results
from paged_cache.cli import app
from paged_cache.cli.bench.shared import finish

FRAGMENT = re.compile(r"(Of|By|For|That|With|In|Which|From|To|At) ")


def options():
    """All options and arguments, with the command that has them."""
    root = typer.main.get_command(app)
    bench = root.commands["bench"]
    for command in [*root.commands.values(), *bench.commands.values()]:
        for one in command.params:
            if getattr(one, "help", None) is not None:
                yield f"{command.name} {one.opts[0]}", one.help


def test_help_says_what_an_option_is():
    """Each text is a phrase that begins with a thing or with what is done, not a fragment, and ends like one."""
    found = dict(options())

    assert len(found) > 100
    assert not {name: text for name, text in found.items() if FRAGMENT.match(text) or len(text.split()) < 3}


@pytest.mark.parametrize("quick", [False, True])
def test_quick_runs_are_not_judged(quick, tmp_path, capsys):
    """Goals of a run in full are shown and written; after a quick one a line says that there is no verdict."""
    goal = Goal("soon", "mean_ttft_ms", "ours", at_most=1.0)
    lines = [Line({"batch": 1}, "ours", {"mean_ttft_ms": [5.0]})]
    results = Results("x", "A title", "c", {}, columns=["mean_ttft_ms"], ours=["ours"], lines=lines, goals=[goal])
    finish(results, tmp_path / "x.json", quick)
    shown = " ".join(capsys.readouterr().out.split())

    assert ("MISSED soon" in shown) is not quick
    assert ("--quick: the figures say little; nothing is compared or judged." in shown) is quick
    assert bool(Results.load(tmp_path / "x.json").goals) is not quick


def test_a_quick_command_has_no_verdicts(tmp_path):
    """The option reaches the end of the command."""
    command = ["bench", "scheduling", "--quick", "--output-json", str(tmp_path / "x.json")]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"}, catch_exceptions=False)

    assert result.exit_code == 0
    assert "nothing is compared or judged" in result.output
    assert not re.search(r"\d x (faster|slower)", result.output)
    assert "(--quick: the figures say little)" in Results.load(tmp_path / "x.json").title
    assert "MISSED" not in result.output
    assert not Results.load(tmp_path / "x.json").goals
