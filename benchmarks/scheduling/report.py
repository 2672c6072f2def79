"""Tables for people, and the picture."""

from pathlib import Path
from typing import Any

from .measuring import DEFAULT, FCFS, FIRST_FIT, METRICS

TITLES = {
    "mean": "mean",
    "p99": "p99",
    "per_token": "per token",
    "ttft": "TTFT",
    "max_wait": "max wait",
    "throughput": "tokens/s",
}


def table(title: str, summaries: list[dict[str, Any]]) -> str:
    """Ratios to the baseline, one line per load and candidate."""
    head = (
        f"{'load':>5} {'policy':<31}" + "".join(f"{TITLES[metric]:>10}" for metric in METRICS) + f"{'preempt/req':>12}"
    )
    lines = [title, head]
    for line in summaries:
        ratios = "".join(f"{line[metric]:10.3f}" for metric in METRICS)
        lines.append(f"{line['load']:5.2f} {line['policy']:<31}{ratios}{line['preemptions']:12.3f}")
    return "\n".join(lines)


def by_workload(summaries: list[dict[str, Any]], load: float, names: list[str]) -> str:
    """Mean and p99 of each workload."""
    lines = [f"each workload at load {load}: mean, p99 and longest wait x {FCFS}"]
    for line in summaries:
        if line["load"] == load and line["policy"] in names:
            parts = line["workloads"]
            cells = (
                f"{w} {parts['mean'][w]:.2f} {parts['p99'][w]:.2f} {parts['max_wait'][w]:.1f}" for w in parts["mean"]
            )
            lines.append(f"{line['policy']:<31}" + " | ".join(cells))
    return "\n".join(lines)


def overhead(lines: list[dict[str, Any]]) -> str:
    """Microseconds."""
    rows = [f"{'policy':<14}{'waiting':>9}{'decode':>9}{'admit':>9}{'add':>9}   us of a step with 32 rows"]
    rows += [
        f"{x['policy']:<14}{x['num_waiting']:>9,}{x['decode']:9.1f}{x['admit']:9.1f}{x['add']:9.1f}" for x in lines
    ]
    return "\n".join(rows)


def verdicts(goals: list[dict[str, Any]]) -> str:
    """What is met and what is not."""
    return "\n".join(
        f"{'met   ' if goal['is_met'] else 'MISSED'} {goal['value']:6.3f}  {goal['goal']}" for goal in goals
    )


def plot(found: dict[str, Any], path: Path) -> None:
    """Mean against p99, what starves, and what a step costs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), constrained_layout=True)
    lines = [line for line in found["summaries"] if line["load"] == 1.0 and line["baseline"] == FCFS]
    for line in lines:
        if line["policy"] == FIRST_FIT:
            continue  # lies on FCFS: there is memory for everything
        is_default = line["policy"] == DEFAULT
        left.scatter(
            line["mean"], line["p99"], s=90 if is_default else 40, color="tab:red" if is_default else "tab:blue"
        )
        left.annotate(
            line["policy"], (line["mean"], line["p99"]), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    left.set(
        xlabel="mean latency x FCFS", ylabel="p99 latency x FCFS", title="load 1.0, geometric mean of the workloads"
    )
    shown = [line for line in lines if line["policy"] in (FCFS, DEFAULT, "hrrn", "sjf-no-aging")]
    for place, line in enumerate(shown):
        waits = line["workloads"]["max_wait"]
        middle.bar([i + 0.2 * place for i in range(len(waits))], list(waits.values()), 0.2, label=line["policy"])
        middle.set_xticks([i + 0.3 for i in range(len(waits))], list(waits), rotation=30)
    middle.set(ylabel="longest wait x FCFS", title="who starves, load 1.0")
    middle.legend()
    for policy in dict.fromkeys(line["policy"] for line in found["overhead"]):
        own = [line for line in found["overhead"] if line["policy"] == policy]
        for kind, style in (("admit", "o-"), ("decode", "s--")):
            right.plot([x["num_waiting"] for x in own], [x[kind] for x in own], style, label=f"{policy}, {kind}")
    right.axhline(100, color="grey", lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="requests waiting", ylabel="us", title="schedule() with 32 rows")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
