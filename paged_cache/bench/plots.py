"""Pictures of results: lines over a number where there is one, else bars with whiskers. Ours stands out."""

import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..optional import require
from .metrics import Metric
from .results import Case, Results, Spread
from .tables import case_text, varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, OURS = "#1f2430", "#e4e7ec", "#d1495b"
# Distinct in the three usual kinds of colour blindness, and from `OURS` in lightness.
PEERS = ("#30638e", "#6fa8dc", "#8a8f98", "#7fbf7b", "#5c4d7d", "#b39b7d")
OTHERS_OF_OURS = ("#edae49", "#e58b88", "#8c2f39")
MARKERS = "osD^vPX<>"
AXES = ("context", "input_len", "num_prompts", "batch", "batch_size", "adapters")
"""Names of numbers that a horizontal axis is made of, the first one that varies; otherwise any number."""
MOST_PANELS = 6
WIDE = 8.0
"""Values that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Panel:
    """One system of axes: a metric in some cases."""

    metric: str
    title: str
    cases: list[Case]


def draw(results: Results, path: Path) -> Path | None:
    """Writes a PNG file; None where there is nothing to draw. A `$` in a name begins no formula.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says what to install.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    axis = axis_of(results)
    panels = panels_of(results, axis)
    if not panels:
        return None
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    width, height = max(6.5, 4.3 * columns), 3.5 if axis else 0.9 + 0.36 * max(_num_values(results, x) for x in panels)
    title = textwrap.fill(results.title, round(9 * width))
    size = (width, height * rows + 0.4 + 0.2 * title.count("\n") + (0.5 if axis else 0))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    systems = list(figure.subplots(rows, columns, squeeze=False).flat)
    styles = styles_of(results)
    for axes, panel in itertools.zip_longest(systems, panels):
        if panel is None:
            axes.axis("off")
            continue
        _frame(axes, panel)
        if axis:
            _draw_lines(axes, results, panel, axis, styles)
        else:
            _draw_bars(axes, results, panel, styles)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold", parse_math=False)
    if axis:
        handles, labels = _legend(systems)
        legend = figure.legend(
            handles, labels, loc="outside lower left", ncols=min(len(labels), 4), frameon=False, fontsize=9
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def axis_of(results: Results) -> str | None:
    """The number in the cases that a horizontal axis is made of: at least three different ones."""
    values = {name: [case.get(name) for case in results.cases()] for name in varying(results.cases())}
    found = [name for name in values if len(set(filter(_is_number, values[name]))) >= 3]
    return next((name for name in (*AXES, *found) if name in found), None)


def panels_of(results: Results, axis: str | None) -> list[Panel]:
    """A panel per metric and group of cases that differ in the axis only; without an axis, per metric and case.

    Cases that lack the axis, as those of another part of a comparison, are in tables only.
    """
    metrics = [name for name in results.compared or results.columns if any(x.metrics.get(name) for x in results.lines)]
    groups: dict[str, list[Case]] = {}
    keys = [name for name in varying(results.cases()) if name != axis]
    for case in (x for x in results.cases() if axis is None or _is_number(x.get(axis))):
        groups.setdefault(case_text({name: case[name] for name in keys if name in case}), []).append(case)
    panels = [Panel(metric, title, cases) for metric in metrics for title, cases in groups.items()]
    return [x for x in panels if _num_values(results, x) > 1][:MOST_PANELS]


def styles_of(results: Results) -> dict[str, dict[str, Any]]:
    """Colour and marker of each candidate; the first of ours is the strongest."""
    ours = [name for name in results.candidates() if name in results.ours]
    peers = [name for name in results.candidates() if name not in results.ours]
    colors = dict(zip(ours, itertools.chain([OURS], itertools.cycle(OTHERS_OF_OURS)), strict=False))
    colors |= dict(zip(peers, itertools.cycle(PEERS), strict=False))
    markers = itertools.cycle(MARKERS)
    return {name: {"color": colors[name], "marker": next(markers)} for name in [*ours, *peers]}


def _num_values(results: Results, panel: Panel) -> int:
    return sum(bool(line.metrics.get(panel.metric)) for line in results.lines if line.case in panel.cases)


def _frame(axes: "Axes", panel: Panel) -> None:
    title = "\n".join([Metric(panel.metric).label, *textwrap.wrap(panel.title, 40)])
    axes.set_title(title, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#aab1bc")
    axes.tick_params(length=0, labelsize=9, labelcolor=INK, which="both")
    axes.set_axisbelow(True)


def _draw_lines(axes: "Axes", results: Results, panel: Panel, axis: str, styles: dict[str, dict[str, Any]]) -> None:
    """A line per candidate with whiskers, on logarithmic axes where numbers differ much."""
    heights: list[float] = []
    for name, style in styles.items():
        spreads = _spreads(results, panel, name)
        points = sorted((case[axis], spread) for case, spread in spreads if _is_number(case.get(axis)))
        if not points:
            continue
        is_ours = name in results.ours
        medians = [spread.median for _, spread in points]
        heights += medians
        axes.errorbar(
            [x for x, _ in points], medians, yerr=_whiskers([spread for _, spread in points]), label=name, **style,
            linewidth=2.4 if is_ours else 1.5, markersize=6 if is_ours else 5, elinewidth=1, capsize=2,
            zorder=3 if is_ours else 2,
        )  # fmt: skip
    numbers = sorted({case[axis] for case in panel.cases if _is_number(case.get(axis))})
    if numbers[0] > 0 and numbers[-1] / numbers[0] > WIDE:
        axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{x:,g}" for x in numbers])
    axes.minorticks_off()
    if len(numbers) > 6:
        axes.tick_params(axis="x", labelrotation=45)
    _scale_heights(axes, Metric(panel.metric), heights)
    axes.set_xlabel(axis.replace("_", " "), fontsize=9, color=INK, parse_math=False)
    axes.grid(axis="y", color=GRID)


def _scale_heights(axes: "Axes", metric: Metric, heights: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if heights and min(heights) > 0 and max(heights) / min(heights) > WIDE:
        axes.set_yscale("log")
        is_short = max(heights) / min(heights) < 200
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: metric.number(value) if metric.unit == "B" else f"{value:,g}")
    )


def _draw_bars(axes: "Axes", results: Results, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    """A bar per candidate, with its value behind it."""
    metric = Metric(panel.metric)
    bars = [(name, spread) for name in results.candidates() for _, spread in _spreads(results, panel, name)]
    medians = [spread.median for _, spread in bars]
    places = list(range(len(bars)))[::-1]
    axes.barh(
        places, medians, height=0.62, color=[styles[name]["color"] for name, _ in bars],
        xerr=_whiskers([spread for _, spread in bars]), error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    for place, (_, spread) in zip(places, bars, strict=True):
        axes.annotate(
            metric.number(spread.median), (spread.max, place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_yticks(places, [name for name, _ in bars], parse_math=False)
    for label, (name, _) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if name in results.ours else "normal")
    axes.set_xlim(0, 1.22 * max(spread.max for _, spread in bars) or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _spreads(results: Results, panel: Panel, name: str) -> list[tuple[Case, Spread]]:
    lines = [line for case in panel.cases if (line := results.line(case, name))]
    return [(line.case, line.spread(panel.metric)) for line in lines if line.metrics.get(panel.metric)]


def _whiskers(spreads: list[Spread]) -> list[list[float]]:
    """Below and above; nothing, not even an end, where nothing varies."""
    empty = math.nan
    return [
        [x.median - x.min if x.min < x.max else empty for x in spreads],
        [x.max - x.median if x.min < x.max else empty for x in spreads],
    ]


def _legend(systems: list["Axes"]) -> tuple[list[Any], list[str]]:
    """Every candidate that some panel has, once."""
    entries = {
        label: handle for axes in systems for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    return list(entries.values()), list(entries)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
