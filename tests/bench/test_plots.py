"""Pictures: lines over a number, bars otherwise; which numbers and colours."""

import importlib.util

import pytest

from paged_cache.bench.plots import OURS, axis_of, draw, panels_of, styles_of
from paged_cache.bench.results import Line, Results

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib")
NAMES = ("peer", "other", "ours")


def make(cases, metrics=("step_us",)):
    """Three candidates; ours is best."""
    lines = [
        Line(case, name, {metric: [100.0 / i, 120.0 / i] for metric in metrics})
        for case in cases
        for i, name in enumerate(NAMES, 1)
    ]
    return Results("x", "A title", "c", {}, columns=list(metrics), ours=["ours"], lines=lines)


def test_the_axis_is_a_number_that_varies():
    """The context goes before the batch size; two values are no axis, and neither are words or booleans."""
    both = [{"batch": b, "context": c} for b in (1, 2, 4) for c in (128, 512, 2048)]

    assert axis_of(make(both)) == "context"
    assert axis_of(make([{"batch": b, "context": 1} for b in (1, 2, 4)])) == "batch"
    assert axis_of(make([{"width": w} for w in (1, 2, 4)])) == "width"
    assert axis_of(make([{"batch": 1}, {"batch": 2}])) is None
    assert axis_of(make([{"name": name} for name in "abc"])) is None
    assert axis_of(make([{}])) is None


def test_a_panel_per_metric_and_group():
    """With an axis cases that differ in it only share a panel; without one each has its own; six are enough."""
    both = [{"batch": b, "context": c} for b in (1, 8) for c in (128, 512, 2048)]
    panels = panels_of(make(both, ("step_us", "kv_bytes")), "context")

    assert [(x.metric, x.title, len(x.cases)) for x in panels] == [
        ("step_us", "batch 1", 3), ("step_us", "batch 8", 3), ("kv_bytes", "batch 1", 3), ("kv_bytes", "batch 8", 3),
    ]  # fmt: skip
    assert len(panels_of(make([{"name": name} for name in "abcdefghi"]), None)) == 6


def test_cases_of_another_part():
    """Who has no place on the axis is in no panel."""
    cases = [*({"part": "caches", "context": 2**i} for i in range(3)), {"part": "users", "users": 8}]

    assert [x.cases for x in panels_of(make(cases), "context")] == [cases[:3]]


def test_ours_stands_out():
    """One colour is ours alone, and nobody shares a colour with another."""
    styles = styles_of(make([{}]))

    assert styles["ours"]["color"] == OURS
    assert len({style["color"] for style in styles.values()}) == len(NAMES)
    assert len({style["marker"] for style in styles.values()}) == len(NAMES)


@pytest.mark.parametrize(
    "cases",
    [
        [{}],
        [{"context": 2**i} for i in range(4)],
        [*({"context": 2**i} for i in range(4)), {"users": 8}],
        [{"batch": b, "context": c} for b in (1, 8) for c in (1, 2, 3)],
    ],
)
def test_pictures_are_written(tmp_path, cases):
    """Into a folder that did not exist; with samples of zero, and candidates that are missing in some cases."""
    results = make(cases, ("step_us", "kv_bytes"))
    results.lines[0] = Line(results.lines[0].case, "peer", {"step_us": [0.0]})
    results.lines[-1] = Line(results.lines[-1].case, "ours", {}, "out of memory")
    path = draw(results, tmp_path / "new" / "x.png")

    assert path == tmp_path / "new" / "x.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("num_cases", [1, 4])
def test_names_are_no_formulas(tmp_path, num_cases):
    """A `$` in the name of a model or a candidate is drawn as it is."""
    results = make([{"context": 2**i, "model": "$x_{6$"} for i in range(num_cases)])
    results.title = "$x_{6$"
    results.lines = [Line(line.case, f"$y_{{{line.candidate}$", line.metrics) for line in results.lines]
    results.ours = ["$y_{ours$"]

    assert draw(results, tmp_path / "x.png").stat().st_size > 5000


def test_nothing_to_draw(tmp_path):
    """Without numbers there is no picture."""
    results = Results("x", "t", "c", {}, columns=["step_us"], lines=[Line({}, "a", {}, "no")])

    assert draw(results, tmp_path / "x.png") is None
    assert not list(tmp_path.iterdir())
