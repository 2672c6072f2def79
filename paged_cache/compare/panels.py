"""The plots: one function per panel, drawn into matplotlib axes; what each shows, in two sentences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bench.metrics import Metric
from ..bench.results import Results
from ..picture import INK
from .caches import Dynamic, NoCache, Paged, Static
from .concurrency import IN_THREADS, ONE_BY_ONE, PADDED
from .measuring import BATCH, CONCURRENCY, CONTEXT, part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, BLUE, ORANGE, GREEN = "#7d8590", "#3b78c2", "#d9822b", "#2a9d63"
STYLES = {
    NoCache.name: (GREY, "s"),
    Dynamic.name: (BLUE, "o"),
    Static.name: (ORANGE, "^"),
    Paged.name: (GREEN, "D"),
    ONE_BY_ONE: (INK, "v"),
    IN_THREADS: (GREY, "s"),
    PADDED: (BLUE, "o"),
    "generate_batch": (ORANGE, "^"),
    "ContinuousBatcher": (GREEN, "D"),
}
"""Colour and marker."""
LABELS = {
    Static.name: "StaticCache (not compiled)",
    ONE_BY_ONE: "generate, one by one",
    "generate_batch": "transformers' generate_batch",
}
"""In legends, where the name is not enough."""
MEBI = 2**20


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        name: For files and tests.
        title: Above it.
        text: What one sees, and how to read it.
        key: The part that it is about.
        draw: Draws the lines of that part.
    """

    name: str
    title: str
    text: str
    key: str
    draw: Callable[["Axes", Results], None]


def drawable(results: Results) -> list[Panel]:
    """Panels that there are numbers for."""
    return [panel for panel in PANELS if any(line.metrics for line in part(results, panel.key).lines)]


def draw(panel: Panel, axes: "Axes", results: Results) -> None:
    """Draws one panel, with its title, frame and legend."""
    panel.draw(axes, part(results, panel.key))
    axes.set_title(panel.title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="x" if panel.name == "fragmentation" else "y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False, fontsize=8.5, columnspacing=1.2
    )


def _first_token(axes: "Axes", results: Results) -> None:
    _lines(axes, results, CONTEXT, "mean_ttft_ms")
    _logarithmic(axes, results, CONTEXT, "tokens of the prompt", "ms until the first token")


def _next_tokens(axes: "Axes", results: Results) -> None:
    _lines(axes, results, CONTEXT, "mean_tpot_ms")
    _logarithmic(axes, results, CONTEXT, "tokens of the prompt", "ms per further token")


def _memory(axes: "Axes", results: Results) -> None:
    _lines(axes, results, BATCH, "reserved_bytes", MEBI, leave_out=NoCache.name)
    used = series(results, BATCH, "used_bytes").get(Paged.name)
    if used:
        axes.plot(
            used.x, [y / MEBI for y in used.median], color=INK, linestyle=":", linewidth=1.6, label="used by tokens"
        )
    axes.set(
        xlabel="rows of the batch", ylabel="MiB of K and V held (PagedCache: blocks)", xlim=(0, None), ylim=(0, None)
    )
    axes.set_xticks([case[BATCH] for case in results.cases()])
    _label(axes)


def _fragmentation(axes: "Axes", results: Results) -> None:
    case = max(results.cases(), key=lambda case: case[BATCH])
    lines = [line for line in results.lines if line.case == case and any(line.metrics.get("reserved_bytes", []))]
    for y, line in enumerate(reversed(lines)):
        used, wasted = (line.spread(name).median / MEBI for name in ("used_bytes", "wasted_bytes"))
        color = STYLES[line.candidate][0]
        axes.barh(y, used, 0.55, color=color, label="_")
        axes.barh(y, wasted, 0.55, left=used, color="white", edgecolor=color, hatch="////", label="_")
        axes.text(used + wasted, y, f"  {wasted / (used + wasted):.0%} wasted", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(lines)), [line.candidate for line in reversed(lines)])
    axes.set(xlabel=f"MiB of K and V, {case[BATCH]} rows", xlim=(0, 1.3 * axes.get_xlim()[1]))
    axes.barh(0, 0, 0, color=INK, linewidth=0, label="holds tokens of a text")
    axes.barh(0, 0, 0, color="white", edgecolor=INK, hatch="////", linewidth=0, label="reserved for nothing")
    _label(axes)


def _throughput(axes: "Axes", results: Results) -> None:
    _lines(axes, results, CONCURRENCY, "output_throughput")
    _logarithmic(axes, results, CONCURRENCY, "requests at once", "new tokens per second")
    axes.set_yscale("linear")
    axes.set_ylim(0, None)


def _latency(axes: "Axes", results: Results) -> None:
    _lines(axes, results, CONCURRENCY, "mean_e2el_ms")
    for name, found in series(results, CONCURRENCY, "p99_e2el_ms").items():
        axes.plot(found.x, found.median, color=STYLES[name][0], linestyle="--", linewidth=1.2, label="_")
    _logarithmic(axes, results, CONCURRENCY, "requests at once", "ms until complete (dashed: p99)")


@dataclass(frozen=True)
class Series:
    """One candidate's numbers over the cases of a part."""

    x: list[float]
    median: list[float]
    least: list[float]
    most: list[float]


def series(results: Results, key: str, metric: str) -> dict[str, Series]:
    """By candidate, in the order of the cases; those without samples are left out."""
    found: dict[str, Series] = {}
    for name in results.candidates():
        lines = [line for line in results.lines if line.candidate == name and line.metrics.get(metric)]
        spreads = [line.spread(metric) for line in lines]
        if lines:
            x = [float(line.case[key]) for line in lines]
            found[name] = Series(x, [s.median for s in spreads], [s.min for s in spreads], [s.max for s in spreads])
    return found


def _lines(
    axes: "Axes", results: Results, key: str, metric: str, unit: float = 1.0, leave_out: str | None = None
) -> None:
    for name, found in series(results, key, metric).items():
        if name == leave_out:
            continue
        color, marker = STYLES[name]
        median, least, most = ([y / unit for y in values] for values in (found.median, found.least, found.most))
        axes.plot(
            found.x, median, color=color, marker=marker, markersize=5, linewidth=1.8, label=LABELS.get(name, name)
        )
        axes.fill_between(found.x, least, most, color=color, alpha=0.15, linewidth=0)


def _logarithmic(axes: "Axes", results: Results, key: str, x: str, y: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    values = sorted({case[key] for case in results.cases()})
    axes.set_xticks(values, [f"{value:,}" for value in values])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set(xlabel=x, ylabel=y)
    _label(axes)


def _label(axes: "Axes") -> None:
    axes.xaxis.label.set(fontsize=9.5, color=INK)
    axes.yaxis.label.set(fontsize=9.5, color=INK)


def _plain(value: float, _: Any) -> str:
    return Metric("").number(value)


PANELS = (
    Panel(
        "first_token",
        "Prefill: time to the first token",
        "The whole prompt is computed before there is a first token, and every cache has the same work to do. The lines "
        "lie on each other; a program whose prompts start alike gets below them with PagedCache, which keeps prefixes.",
        CONTEXT,
        _first_token,
    ),
    Panel(
        "next_tokens",
        "Decode: time per further token",
        "Without a KV cache each token costs as much as the whole prompt again; with one, a step reads K and V of the text "
        "so far. Both axes are logarithmic, and the band goes from the fastest round to the slowest.",
        CONTEXT,
        _next_tokens,
    ),
    Panel(
        "memory",
        "Memory for keys and values",
        "A DynamicCache is as wide as the longest row of its batch, a StaticCache as that row and its "
        "answer from the start, a PagedCache holds blocks of 16 tokens. The dotted line is what the tokens themselves need.",
        BATCH,
        _memory,
    ),
    Panel(
        "fragmentation",
        "Fragmentation of the largest batch",
        "The full part of a bar holds tokens of a text; the hatched part holds padding, or room that nobody came to use. "
        "Only blocks that the PagedCache holds are counted: the others of its pool serve other calls.",
        BATCH,
        _fragmentation,
    ),
    Panel(
        "throughput",
        "Requests at once: throughput",
        "The same requests, with prompts and answers of different lengths, served in each way; higher is better. A padded "
        "batch computes padding and waits for its longest answer, threads compute every request by itself.",
        CONCURRENCY,
        _throughput,
    ),
    Panel(
        "latency",
        "Requests at once: latency",
        "Time from the start until a request has its last token: the mean as a full line, the slowest (99th percentile) "
        "dashed; lower is better. All requests are there at the start, so those that wait count their waiting.",
        CONCURRENCY,
        _latency,
    ),
)
