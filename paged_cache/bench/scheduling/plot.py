"""The picture: mean against p99, what starves, and what a step costs."""

from pathlib import Path
from typing import Any

from ..results import Results
from .measuring import DEFAULT, FCFS, FIRST_FIT, RATIOS

FULL = {"section": "slots", "load": 1.0}
STARVING = (FCFS, DEFAULT, "hrrn", "sjf-no-aging")
WORTH_A_LOOK = 100  # us


def draw(found: Results, path: Path) -> Path:
    """Writes a PNG."""
    from matplotlib.figure import Figure  # optional, and without pyplot: no window, no global state

    figure = Figure(figsize=(17, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _latencies(left, found)
    _longest_waits(middle, found)
    _overhead(right, found)
    figure.savefig(path, dpi=110)
    return path


def _latencies(ax: Any, found: Results) -> None:
    """First fit lies on FCFS: there is memory for everything."""
    for line in (line for line in found.lines if line.case == FULL and line.candidate != FIRST_FIT):
        place = [line.spread(RATIOS[metric]).median for metric in ("mean", "p99")]
        is_default = line.candidate == DEFAULT
        ax.scatter(*place, s=90 if is_default else 40, color="tab:red" if is_default else "tab:blue")
        ax.annotate(line.candidate, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    ax.set(xlabel="mean latency x FCFS", ylabel="p99 latency x FCFS", title="load 1.0, geometric mean of the workloads")


def _longest_waits(ax: Any, found: Results) -> None:
    """Of each workload."""
    at_full_load = [x for x in found.details["workloads"] if FULL.items() <= x.items() and x["baseline"] == FCFS]
    shown = [x for x in at_full_load if x["policy"] in STARVING]
    for place, one in enumerate(shown):
        waits = one["max_wait"]
        ax.bar([i + 0.2 * place for i in range(len(waits))], list(waits.values()), 0.2, label=one["policy"])
        ax.set_xticks([i + 0.3 for i in range(len(waits))], list(waits), rotation=30)
    ax.set(ylabel="longest wait x FCFS", title="who starves, load 1.0")
    if shown:
        ax.legend()


def _overhead(ax: Any, found: Results) -> None:
    lines = [line for line in found.lines if line.case["section"] == "overhead"]
    for policy in dict.fromkeys(line.candidate for line in lines):
        own = [line for line in lines if line.candidate == policy]
        for kind, style in (("admit", "o-"), ("decode", "s--")):
            times = [line.spread(f"{kind}_us").median for line in own]
            ax.plot([line.case["num_waiting"] for line in own], times, style, label=f"{policy}, {kind}")
    ax.axhline(WORTH_A_LOOK, color="grey", lw=0.8)
    ax.set(xscale="log", yscale="log", xlabel="requests waiting", ylabel="us", title="schedule() with 32 rows")
    ax.legend()
