"""The format of results: what is written comes back, samples of the same rounds are divided, and goals are judged."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from paged_cache.bench import machine
from paged_cache.bench.results import Goal, Line, NotResultsError, OtherSettingsError, Results, Spread, environment
from paged_cache.errors import PagedCacheError

CASES = ({"batch": 1}, {"batch": 8})
GOAL = Goal("half the time", "elapsed_s", "ours", "peer", at_most=0.5)


def make(**other):
    """Two cases, in which ours takes 0.4 and 0.6 of the peer's time in every round, and one who does not run."""
    lines = []
    for case, ratio in zip(CASES, (0.4, 0.6), strict=True):
        lines.append(Line(case, "peer", {"elapsed_s": [1.0, 5.0, 3.0], "tokens": [7.0, 7.0, 7.0]}))
        lines.append(Line(case, "ours", {"elapsed_s": [ratio, 5 * ratio, 3 * ratio], "tokens": [7.0, 7.0, 7.0]}))
    lines.append(Line(CASES[0], "absent", {}, "not installed"))
    parts = {"name": "n", "title": "t", "command": "c", "environment": {"commit": "abc", "seed": 3}}
    parts |= {"settings": {"rounds": 3, "lengths": [1, 2]}, "columns": ["elapsed_s"], "compared": ["elapsed_s"]}
    return Results(**(parts | {"ours": ["ours"], "lines": lines, "goals": [GOAL], "details": {"x": 1}} | other))


def test_spread():
    """Median, least and most."""
    assert Spread.of([3.0, 1.0, 9.0, 2.0]) == Spread(2.5, 1.0, 9.0)


def test_files_come_back(tmp_path):
    """All that was saved is loaded again, from a folder that did not exist, with the environment at the top of the file."""
    path = make().save(tmp_path / "new" / "r.json")
    data = json.loads(path.read_text(encoding="utf-8"))

    assert Results.load(path) == make()
    assert (data["format"], data["commit"], data["seed"]) == (1, "abc", 3)
    assert data["verdicts"] == [
        {"text": "half the time", "case": {"batch": 8}, "value": pytest.approx(0.6), "met": False}
    ]


def test_numbers_that_json_lacks(tmp_path):
    """An infinite request rate and a path among the settings leave a file that any reader of JSON can read."""
    path = make(settings={"rate": float("inf"), "data": Path("x.csv"), "sizes": (1, 2)}).save(tmp_path / "r.json")

    def refuse(text):
        raise AssertionError(text)

    settings = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)["settings"]
    assert settings == {"rate": "inf", "data": "x.csv", "sizes": [1, 2]}


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "3", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "name": "x"}', "\udcff"],
)
def test_foreign_files_are_refused(tmp_path, text):
    """Whatever else a file contains, the error names the file and is one of ours."""
    path = tmp_path / "r.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")

    with pytest.raises(NotResultsError, match=r"r\.json is no file of results in format 1") as caught:
        Results.load(path)
    assert isinstance(caught.value, PagedCacheError)


def test_lines_with_unknown_parts_are_refused(tmp_path):
    """A line of some later format is not read in part."""
    path = make().save(tmp_path / "r.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["lines"][0]["quartiles"] = []
    path.write_text(json.dumps(data), encoding="utf-8")

    with pytest.raises(NotResultsError):
        Results.load(path)


def test_samples_of_the_same_round_are_divided():
    """The ratio has no spread where ours takes the same share of every round, however long rounds take."""
    ratio = make().ratio(CASES[0], "elapsed_s", "ours", "peer")

    assert (ratio.min, ratio.median, ratio.max) == pytest.approx((0.4, 0.4, 0.4))
    assert make().ratio(CASES[0], "elapsed_s", "ours", "absent") is None
    assert make().ratio(CASES[0], "elapsed_s", "ours", "nobody") is None
    assert make().ratio({"batch": 2}, "elapsed_s", "ours", "peer") is None
    assert make().ratio(CASES[0], "other_s", "ours", "peer") is None


def test_nothing_is_divided_by_zero():
    """Rounds in which the peer measured 0 have no ratio."""
    results = make(lines=[Line({}, "ours", {"n": [2.0, 3.0]}), Line({}, "peer", {"n": [0.0, 6.0]})])

    assert results.ratio({}, "n", "ours", "peer") == Spread(0.5, 0.5, 0.5)


def test_a_metric_with_holes_is_an_error():
    """Where a metric has fewer samples than there were rounds, nobody can say which belong together."""
    results = make(lines=[Line({}, "ours", {"a": [1.0, 1.0], "b": [1.0]}), Line({}, "peer", {"b": [1.0]})])

    with pytest.raises(ValueError, match="ours has 1 samples of b in 2 rounds"):
        results.ratio({}, "b", "ours", "peer")


def test_goals_are_judged_by_their_worst_case():
    """The largest of ratios that should be small, the smallest of values that should be large, in the cases they name."""
    goals = [
        GOAL,
        Goal("small batches", "elapsed_s", "ours", "peer", at_most=0.5, case={"batch": 1}),
        Goal("all tokens", "tokens", "ours", at_least=7),
        Goal("more tokens", "tokens", "ours", at_least=8, is_stretch=True),
        Goal("not measured", "elapsed_s", "ours", "absent", at_most=1.0),
        Goal("no such case", "elapsed_s", "ours", "peer", at_most=1.0, case={"batch": 3}),
        Goal("no such metric", "other_s", "ours", at_most=1.0),
    ]
    found = {x.goal.text: (x.case, round(x.value, 6), x.is_met) for x in make(goals=goals).verdicts()}

    assert found == {
        "half the time": (CASES[1], 0.6, False),
        "small batches": (CASES[0], 0.4, True),
        "all tokens": (CASES[0], 7.0, True),
        "more tokens": (CASES[0], 7.0, False),
    }


def test_the_worst_value_of_at_least():
    """It is the smallest."""
    lines = [Line(case, "ours", {"n": [value]}) for case, value in zip(CASES, (5.0, 4.0), strict=True)]
    (verdict,) = make(lines=lines, goals=[Goal("g", "n", "ours", at_least=5)]).verdicts()

    assert (verdict.case, verdict.value, verdict.is_met) == (CASES[1], 4.0, False)


@pytest.mark.parametrize("limits", [{}, {"at_most": 1.0, "at_least": 0.5}])
def test_a_goal_has_one_limit(limits):
    """Neither none nor two."""
    with pytest.raises(ValueError, match="'g' needs either at_most or at_least"):
        Goal("g", "elapsed_s", "ours", **limits)


def test_rounds_are_added():
    """Samples go behind the others; who was not there in a round has no ratio in it, and later ones stay matched."""
    results = make()
    results.add([Line(CASES[0], "ours", {"elapsed_s": [100.0], "tokens": [7.0]})])
    results.add(
        [
            Line(CASES[0], "peer", {"elapsed_s": [8.0], "tokens": [7.0]}),
            Line(CASES[0], "ours", {"elapsed_s": [2.0], "tokens": [7.0]}),
        ]
    )
    ratio = results.ratio(CASES[0], "elapsed_s", "ours", "peer")

    assert results.line(CASES[0], "ours").metrics["elapsed_s"] == pytest.approx([0.4, 2.0, 1.2, 100.0, 2.0])
    assert results.line(CASES[0], "ours").round_numbers() == [0, 1, 2, 3, 4]
    assert results.line(CASES[0], "peer").round_numbers() == [0, 1, 2, 4]
    assert (ratio.min, ratio.max) == pytest.approx((0.25, 0.4))
    assert results.ratio(CASES[1], "elapsed_s", "ours", "peer").max == pytest.approx(0.6)


def test_new_candidates_and_cases_are_added(tmp_path):
    """They are lines of their own; a new candidate in an old case is not matched with rounds it was not in."""
    results = make()
    results.add([Line(CASES[0], "late", {"elapsed_s": [1.0]}), Line({"batch": 2}, "ours", {"elapsed_s": [1.0]})])

    assert results.cases() == [*CASES, {"batch": 2}]
    assert results.candidates() == ["peer", "ours", "absent", "late"]
    assert results.ratio(CASES[0], "elapsed_s", "ours", "late") is None
    assert Results.load(results.save(tmp_path / "r.json")) == results


def test_a_note_takes_the_samples_place():
    """Who turns out to be wrong loses earlier times; who runs at last loses the note."""
    results = make()
    results.add([Line(CASES[0], "peer", {}, "WRONG: 1"), Line(CASES[0], "absent", {"elapsed_s": [1.0]})])

    assert (results.line(CASES[0], "peer").metrics, results.line(CASES[0], "peer").note) == ({}, "WRONG: 1")
    assert (results.line(CASES[0], "absent").note, results.line(CASES[0], "absent").round_numbers()) == ("", [3])


def test_earlier_rounds_come_first(tmp_path):
    """A second run is added to what a file has, and the file says of which commit the earlier ones are."""
    earlier = Results.load(make().save(tmp_path / "r.json"))
    later = make(environment={"commit": "def", "seed": 3}, settings={"rounds": 3, "lengths": (1, 2)})
    later.add_to(earlier)

    assert later.line(CASES[0], "peer").metrics["elapsed_s"] == [1.0, 5.0, 3.0, 1.0, 5.0, 3.0]
    assert later.line(CASES[0], "peer").round_numbers() == [0, 1, 2, 3, 4, 5]
    assert later.environment == {"commit": "def", "seed": 3, "earlier": [{"commit": "abc", "seed": 3}]}


def test_other_settings_are_not_added():
    """The error names what differs, and nothing was changed."""
    later = make(settings={"rounds": 4, "lengths": [1, 2]})

    with pytest.raises(
        OtherSettingsError, match=r"Rounds with \{'rounds': 4\} .* earlier ones of n with \{'rounds': 3\}"
    ):
        later.add_to(make())
    assert later == make(settings={"rounds": 4, "lengths": [1, 2]})


def test_environment():
    """It has what a number can depend on: device, threads, load, date, versions, commit and seed."""
    found = environment(seed=7)

    assert found["seed"] == 7
    assert found["device"].startswith("cpu, ")
    assert found["device"].endswith(" cores")
    assert found["threads"] == torch.get_num_threads()
    assert found["load"] >= 0
    assert {"torch", "transformers"} <= found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__
    assert found["date"].count("-") == 2
    assert environment(0, device="meta")["device"] == "meta"


def test_the_commit_is_that_of_this_checkout(monkeypatch):
    """It is what git says, unless the package lies in somebody else's checkout, git is not there, or hangs."""
    asked = []
    answers = {"ls-files": "machine.py", "describe": "abc-dirty"}

    def run(command, **_):
        asked.append(command[3])
        if isinstance(answers[command[3]], Exception):
            raise answers[command[3]]
        return subprocess.CompletedProcess(command, 0, stdout=answers[command[3]] + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert environment(0)["commit"] == "abc-dirty"
    for error in (FileNotFoundError("git"), subprocess.TimeoutExpired("git", 20)):
        answers["describe"] = error
        assert environment(0)["commit"] is None
    answers["ls-files"] = subprocess.CalledProcessError(1, "git")
    asked.clear()
    assert environment(0)["commit"] is None
    assert asked == ["ls-files"]


def test_a_machine_that_tells_little(monkeypatch, tmp_path):
    """Without a list of processors and without loads the rest is there."""
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "none")
    monkeypatch.delattr(machine.os, "getloadavg")

    found = environment(0)
    assert found["load"] is None
    assert found["device"].startswith("cpu, ")
