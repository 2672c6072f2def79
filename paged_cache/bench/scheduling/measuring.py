"""Policies, what is measured of them, and ratios to a baseline."""

import math
from collections.abc import Iterable
from typing import Any

from .reference import ShortestRemainingFirst
from .simulator import Engine, Outcome, Simulation
from .workloads import Job, arrive, make_jobs

Numbers = dict[str, float]
FCFS, FIRST_FIT, DEFAULT, FREE_SRPT = "fcfs", "first-fit fifo", "sjf", "srpt, oracle, free preemption"

CANDIDATES: dict[str, dict[str, Any]] = {
    FCFS: {"policy": "fcfs"},
    # transformers' FIFOScheduler: who does not fit is skipped, however often
    FIRST_FIT: {"policy": "fcfs", "max_displacement": math.inf, "backfill": math.inf},
    DEFAULT: {"policy": "sjf"},
    "hrrn": {"policy": "hrrn"},
    "sjf-no-aging": {"policy": "sjf-no-aging"},
    "sjf, oracle": {"policy": "sjf", "predictions": "oracle"},
    "sjf-no-aging, oracle": {"policy": "sjf-no-aging", "predictions": "oracle"},
    "sjf, random": {"policy": "sjf", "predictions": "random"},
    "sjf, reversed": {"policy": "sjf", "predictions": "reversed"},
    "sjf-no-aging, reversed": {"policy": "sjf-no-aging", "predictions": "reversed"},
}
RATIOS = {
    "mean": "mean_e2el_ratio",
    "p99": "p99_e2el_ratio",
    "per_token": "mean_e2el_per_token_ratio",
    "ttft": "mean_ttft_ratio",
    "max_wait": "max_wait_ratio",
    "throughput": "output_throughput_ratio",
}
"""What tables call them: ratios to strict first come, first served."""

OTHER_BASELINE = "_to_first_fit"
"""Behind the names of ratios to that one."""

METRICS = ("mean", "p99", "per_token", "ttft", "max_wait", "throughput")


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which so many are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summarise(outcomes: list[Outcome]) -> Numbers:
    """Seconds, tokens a second, and preemptions per request."""
    jobs, latencies = [o.job for o in outcomes], [o.latency for o in outcomes]
    makespan = max(o.job.time + o.latency for o in outcomes) - min(job.time for job in jobs)
    return {
        "mean": sum(latencies) / len(latencies),
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
        "per_token": sum(o.latency / o.job.output for o in outcomes) / len(outcomes),
        "ttft": sum(o.first_token for o in outcomes) / len(outcomes),
        "max_wait": max(o.waited for o in outcomes),
        "throughput": sum(job.output for job in jobs) / makespan,
        "preemptions": sum(o.num_preemptions for o in outcomes) / len(outcomes),
        "queue_share": sum(o.waited for o in outcomes) / sum(latencies),
    }


def capacity(engine: Engine, jobs: list[Job]) -> float:
    """Requests a second, first come, first served, while there are always more: from 10 to 80 % of the completions."""
    outcomes = Simulation(engine, [Job(**{**vars(job), "time": 0.0}) for job in jobs], policy="fcfs").run()
    ends = sorted(o.latency for o in outcomes)
    low, high = len(ends) // 10, len(ends) * 8 // 10
    return (high - low) / (ends[high] - ends[low])


def serve(engine: Engine, jobs: list[Job], name: str) -> Numbers:
    """What one candidate makes of the jobs."""
    if name == FREE_SRPT:
        return summarise(ShortestRemainingFirst(engine, jobs).run())
    simulation = Simulation(engine, jobs, **CANDIDATES[name])
    found = summarise(simulation.run())
    correlation = simulation.scheduler.stats.correlation
    return found | {"correlation": math.nan if correlation is None else correlation}


def measure(
    engine: Engine, workload: str, count: int, seed: int, loads: dict[float, list[str]]
) -> list[dict[str, Any]]:
    """One line per load and candidate; all candidates of a load get the same arrivals."""
    jobs = make_jobs(workload, count, seed)
    rate = capacity(engine, jobs)
    lines = []
    for load, names in loads.items():
        arrivals = arrive(workload, jobs, load * rate, seed)
        for name in names:
            place = {"workload": workload, "seed": seed, "load": load, "policy": name}
            lines.append(place | serve(engine, arrivals, name))
    return lines


def ratios(lines: list[dict[str, Any]], load: float, name: str, baseline: str, metric: str) -> dict[str, float]:
    """Of each workload: geometric mean over the seeds of the ratio to the baseline."""
    chosen = [line for line in lines if line["load"] == load]
    values = {(line["workload"], line["seed"], line["policy"]): line[metric] for line in chosen}
    found: dict[str, list[float]] = {}
    for (workload, seed, policy), value in values.items():
        if policy == name:
            found.setdefault(workload, []).append(max(value, 1e-3) / max(values[workload, seed, baseline], 1e-3))
    return {workload: geometric_mean(parts) for workload, parts in found.items()}


def compare(lines: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One line per load and candidate: ratios to the baseline, each the geometric mean over the workloads, and theirs."""
    found = []
    for load, name in dict.fromkeys((line["load"], line["policy"]) for line in lines):
        own = [line for line in lines if (line["load"], line["policy"]) == (load, name)]
        parts = {metric: ratios(lines, load, name, baseline, metric) for metric in METRICS}
        found.append(
            {"load": load, "policy": name, "baseline": baseline}
            | {metric: geometric_mean(values.values()) for metric, values in parts.items()}
            | {"preemptions": sum(line["preemptions"] for line in own) / len(own)}
            | {"queue_share": sum(line["queue_share"] for line in own) / len(own), "workloads": parts}
        )
    return found
