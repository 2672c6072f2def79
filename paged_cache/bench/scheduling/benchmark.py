"""`bench scheduling`: who is served first, and what it is worth. The real scheduler in virtual time, on traces and seeded workloads.

The object that decides is the `Scheduler` of the batcher; its memory is numbers, and a step takes `per_step + per_token *
tokens + per_kv * context` seconds. Load 1 is what strict first come, first served gets done when there are always more
requests. Section "slots" has memory for everything; in "memory" the pool is what limits. All candidates get the same
arrivals; figures are ratios to a baseline, geometric means over seeds and workloads. "overhead" is real time.
"""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..measuring import Tick
from ..results import Line, Results, environment
from .goals import goals
from .measuring import CANDIDATES, DEFAULT, FCFS, FIRST_FIT, FREE_SRPT, OTHER_BASELINE, RATIOS, compare, measure
from .overhead import measure_overhead
from .simulator import Engine
from .workloads import WORKLOADS, make_jobs

BOUND = [FCFS, FIRST_FIT, DEFAULT, "hrrn", "sjf-no-aging", "sjf, oracle"]  # candidates where memory limits
POOL = 12  # mean requests that fit into it
TITLE = "Scheduling in virtual time: ratios to strict first come, first served"
OVERHEAD_ROUNDS = 300
Task = tuple[Engine, str, int, int, dict[float, list[str]]]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        workloads: Names.
        loads, memory_loads: With memory for everything, and where the pool limits.
        count: Requests of a run.
        seeds, seed: How many, and the first one.
        engine: The machine.
        waiting: Requests that wait where the scheduler's own time is measured.
        jobs: Processes.
    """

    workloads: Sequence[str] = tuple(WORKLOADS)
    loads: Sequence[float] = (0.5, 0.9, 1.0, 1.2)
    memory_loads: Sequence[float] = (0.9, 1.1)
    count: int = 1500
    seeds: int = 3
    seed: int = 0
    engine: Engine = field(default_factory=Engine)
    waiting: Sequence[int] = (1000, 10_000, 100_000)
    jobs: int = 1

    def places(self) -> list[tuple[str, int]]:
        """Workloads and seeds."""
        return [(name, seed) for name in self.workloads for seed in range(self.seed, self.seed + self.seeds)]


QUICK: dict[str, Any] = {
    "workloads": ("tenants", "mixed"),
    "loads": (1.0,),
    "memory_loads": (1.1,),
    "waiting": (1000, 10_000),
    "count": 200,
    "seeds": 1,
}
"""A smoke test: few requests, two workloads."""


def read_engine(slots: int, path: Path | None) -> Engine:
    """The machine: guessed, or with measured times from a JSON file with `per_step`, `per_token` and `per_kv` in seconds."""
    times = json.loads(path.read_text(encoding="utf-8")) if path else {}
    own = {name: float(times[name]) for name in ("per_step", "per_token", "per_kv") if name in times}
    return dataclasses.replace(Engine(slots=slots), **own)  # type: ignore[arg-type]  # all three are floats


def run(options: Options, command: str = "", tick: Tick = lambda name: None) -> Results:
    """Serves everything.

    Args:
        options: See there.
        command: What was typed.
        tick: Called with the name of each part before it runs.

    Raises:
        ValueError: A workload has no such name.
    """
    unknown = sorted(set(options.workloads) - set(WORKLOADS))
    if unknown:
        raise ValueError(f"there are no workloads {unknown}, only {WORKLOADS}")
    found = Results(
        "scheduling",
        TITLE,
        command,
        environment(options.seed),
        asdict(options),
        columns=[*RATIOS.values(), "preemptions", "decode_us", "admit_us", "add_us"],
        ours=[name for name in CANDIDATES if name not in (FCFS, FIRST_FIT)],
        goals=goals(),
    )
    for section, tasks in (("slots", slots_tasks(options)), ("memory", memory_tasks(options))):
        served = _serve(section, tasks, options.jobs, tick)
        add_summaries(found, section, [line for baseline in (FCFS, FIRST_FIT) for line in compare(served, baseline)])
    for policy in (DEFAULT, "hrrn", FCFS):
        for count in options.waiting:
            tick(f"overhead {policy} {count}")
            add_overhead(found, measure_overhead(policy, count, OVERHEAD_ROUNDS))
    return found


def slots_tasks(options: Options) -> list[Task]:
    """Memory for everything."""
    loads = {load: [*CANDIDATES, FREE_SRPT] for load in options.loads}
    return [(options.engine, name, options.count, seed, loads) for name, seed in options.places()]


def memory_tasks(options: Options) -> list[Task]:
    """A pool that limits."""
    loads = dict.fromkeys(options.memory_loads, BOUND)
    return [
        (small_pool(options, name, seed), name, options.count, seed, loads) for name, seed in options.places() if loads
    ]


def small_pool(options: Options, workload: str, seed: int) -> Engine:
    """Four times the slots, and memory for twelve mean requests or the largest one."""
    engine = options.engine
    tokens = [job.prompt + job.output for job in make_jobs(workload, options.count, seed)]
    num_blocks = max(POOL * sum(tokens) // len(tokens), max(tokens) + 1) // engine.block_size + 2
    return replace(engine, slots=4 * engine.slots, num_blocks=num_blocks)


def add_summaries(found: Results, section: str, summaries: list[dict[str, Any]]) -> None:
    """A line per load and candidate; what each workload gave goes to the details."""
    for one in summaries:
        case, name = {"section": section, "load": one["load"]}, one["policy"]
        suffix = "" if one["baseline"] == FCFS else OTHER_BASELINE
        line = found.line(case, name)
        if line is None:
            rest = {"preemptions": [one["preemptions"]], "queue_percent": [_short(100 * one["queue_share"])]}
            found.lines.append(line := Line(case, name, rest))
        line.metrics.update({RATIOS[metric] + suffix: [_short(one[metric])] for metric in RATIOS})
        parts = {m: {w: _short(x) for w, x in of.items()} for m, of in one["workloads"].items()}
        found.details.setdefault("workloads", []).append(
            {"section": section, **{key: one[key] for key in ("load", "policy", "baseline")}, **parts}
        )


def add_overhead(found: Results, one: dict[str, Any]) -> None:
    """Microseconds of steps."""
    case = {"section": "overhead", "num_waiting": one["num_waiting"]}
    times = {f"{kind}_us": [_short(one[kind])] for kind in ("decode", "admit", "add")}
    found.lines.append(Line(case, one["policy"], times))


def _serve(title: str, tasks: list[Task], num_jobs: int, tick: Tick) -> list[dict[str, Any]]:
    names = [f"{title} {workload} {seed}" for _, workload, _, seed, _ in tasks]
    lines: list[dict[str, Any]] = []
    with ProcessPoolExecutor(num_jobs) if num_jobs > 1 else nullcontext() as pool:
        results = [partial(measure, *task) if pool is None else pool.submit(measure, *task).result for task in tasks]
        for name, result in zip(names, results, strict=True):
            tick(name)
            lines += result()
    return lines


def _short(number: float) -> float:
    return float(f"{number:.4g}")
