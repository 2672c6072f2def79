"""The picture: bandwidth over the size of K and V, and the roofline of all lines."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..results import Results
from .assembling import timings
from .machines import Ceilings
from .timing import Timing

COLOURS = {"float32": "#1f77b4", "bfloat16": "#d95f02", "int8": "#2ca02c", "float8_e4m3fn": "#9467bd"}
MARKERS = {"decode": "o", "prefill": "s", "chunk": "D", "mixed": "^", "step": "v"}  # all else is some kind of decode
GREY = "#555555"
FEWEST_SIZES = 3  # of a model's heads, for a panel of their own
Heads = tuple[int, int, int]


def draw(found: Results, path: Path) -> Path:
    """Writes a PNG: a panel for each shape of heads with several sizes, then the roofline.

    Args:
        found: Of `bench kernels`. Shapes without times are left out; the ceilings are drawn as lines.
        path: Where to.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure  # optional, and without pyplot: no window, no global state

    results = [timing for timing in timings(found) if timing.times]
    ceilings, kind, where = Ceilings(**found.details["ceilings"]), found.settings["device"], found.environment
    panels = _panels(results)
    columns = 2 if panels else 1
    rows = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.4 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax, (heads, lines) in zip(axes, panels.items(), strict=False):
        _bandwidth(ax, heads, lines, ceilings, kind)
    _roofline(axes[len(panels)], results, ceilings, kind)
    for ax in axes[len(panels) + 1 :]:
        ax.axis("off")
    title = f"Attention over blocks: {where['device']}, threads: {where['threads']}"
    figure.suptitle(f"{title}; torch {where['versions']['torch']}, {where['commit']}")
    figure.savefig(path, dpi=120)
    return path


def _panels(results: list[Timing]) -> dict[Heads, list[Timing]]:
    """Decode, by heads."""
    found: dict[Heads, list[Timing]] = defaultdict(list)
    for result in results:
        if result.shape.q_len == 1 and not result.shape.first and not result.shape.window:
            found[result.shape.heads, result.shape.kv_heads, result.shape.dim].append(result)
    return {heads: lines for heads, lines in found.items() if len({x.shape.kv_bytes for x in lines}) >= FEWEST_SIZES}


def _bandwidth(ax: Any, heads: Heads, lines: list[Timing], ceilings: Ceilings, kind: str) -> None:
    limit, name = (ceilings.read, "read") if kind == "cpu" else (ceilings.copy, "copy")
    top = limit
    for dtype, colour in COLOURS.items():
        own = [x for x in lines if (x.shape.kv_dtype or x.shape.dtype) == dtype]
        ours = [(x.shape.kv_bytes, x.bandwidth) for x in own if x.shape.section != "scattered"]
        scattered = [(x.shape.kv_bytes, x.bandwidth) for x in own if x.shape.section == "scattered"]
        peers = [
            (x.shape.kv_bytes, x.shape.kv_bytes / x.times["sdpa"] / 1e3)
            for x in own
            if "sdpa" in x.times and not x.shape.kv_dtype
        ]
        if ours:
            ax.plot(*_medians(ours), color=colour, label=dtype)
            ax.plot(*_columns(ours), "o", color=colour, markersize=3.5)
        if scattered:
            ax.plot(*_columns(scattered), "x", color=colour, markersize=4, label=f"{dtype}, blocks in random order")
        if peers:
            ax.plot(*_medians(peers), color=colour, linestyle=":", label=f"{dtype}, SDPA on dense K/V")
        top = max([top, *(y for _, y in ours + scattered + peers)])
    ax.axhline(limit, color=GREY, linewidth=1)
    label = f"plain {name}: {limit:,.0f} GB/s"
    ax.annotate(label, (0.985, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0, 1.45 * top)  # room for the legend
    ax.set(xlabel="K and V, MiB", ylabel="GB/s", title=f"decode, {heads[0]} query and {heads[1]} kv heads x {heads[2]}")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="upper left", ncols=2)


def _roofline(ax: Any, results: list[Timing], ceilings: Ceilings, kind: str) -> None:
    limit = ceilings.read if kind == "cpu" else ceilings.copy
    x = [result.shape.flops / result.shape.nbytes for result in results]
    left, right = min(x) / 1.6, max(*x, 2 * max(ceilings.gflops.values()) / limit)
    for dtype, peak in ceilings.gflops.items():
        ax.plot([left, peak / limit, right], [left * limit, peak, peak], color=COLOURS[dtype], linewidth=1)
        ax.annotate(
            f"matrix product, {dtype}", (right, peak), color=COLOURS[dtype], ha="right", va="bottom", fontsize=8
        )
    ax.plot([left, min(ceilings.gflops.values()) / limit], [left * limit, min(ceilings.gflops.values())], color=GREY)
    labels = set()
    for result in results:
        section = result.shape.section if result.shape.section in MARKERS else "decode"
        colour = COLOURS[result.shape.kv_dtype or result.shape.dtype]
        place, style = (
            result.shape.flops / result.shape.nbytes,
            {"marker": MARKERS[section], "color": colour, "markersize": 4},
        )
        if "sdpa" in result.times and section != "decode":  # in the other panels
            theirs = result.shape.flops / result.times["sdpa"] / 1e3
            ax.plot(place, theirs, **style, fillstyle="none", linestyle="none")
        ax.plot(place, result.gflops, **style, linestyle="none")
        labels.add(section)
    for section in (name for name in MARKERS if name in labels):
        ax.plot([], [], marker=MARKERS[section], color=GREY, linestyle="none", markersize=4, label=section)
    if labels - {"decode"}:
        ax.plot(
            [], [], marker="s", color=GREY, linestyle="none", markersize=4, fillstyle="none", label="SDPA, not decode"
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    ax.set(
        xlabel="FLOP per byte that has to be moved", ylabel="GFLOP/s", title="all lines under the machine's ceilings"
    )
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="upper left")  # nothing can be there


def _medians(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """MiB and GB/s, one number for each size."""
    by_size: dict[float, list[float]] = defaultdict(list)
    for size, value in points:
        by_size[size].append(value)
    return _columns((size, statistics.median(values)) for size, values in sorted(by_size.items()))


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    sizes, values = zip(*points, strict=True)
    return [size / 2**20 for size in sizes], list(values)
