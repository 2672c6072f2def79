"""Who is served first, and what it is worth: the real scheduler in virtual time, on traces and seeded workloads.

    python benchmarks/bench_scheduling.py
    python benchmarks/bench_scheduling.py --engine measured.json --slots 32

The object that decides is the `Scheduler` of the batcher; its memory is numbers, and a step takes `per_step + per_token *
tokens + per_kv * context` seconds. `--engine` reads these three from a JSON file. Load 1 is what strict first come, first served
gets done when there are always more requests. Section "slots" has memory for everything; in "memory" the pool is what
limits. All candidates get the same arrivals; figures are ratios to a baseline, geometric means over seeds and workloads.
The package `scheduling` beside this file has the parts.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

import paged_cache
from scheduling import report
from scheduling.goals import judge
from scheduling.measuring import CANDIDATES, DEFAULT, FCFS, FIRST_FIT, FREE_SRPT, compare, measure
from scheduling.overhead import measure_overhead
from scheduling.simulator import Engine
from scheduling.workloads import WORKLOADS, make_jobs

RESULTS = Path(__file__).resolve().parent / "results"
BOUND = [FCFS, FIRST_FIT, DEFAULT, "hrrn", "sjf-no-aging", "sjf, oracle"]  # candidates where memory limits
POOL = 12  # mean requests that fit into it


def main(argv: list[str] | None = None) -> None:
    """Serves, prints, writes."""
    args = arguments(argv)
    engine = read_engine(args)
    loads = {load: [*CANDIDATES, FREE_SRPT] for load in args.loads}
    slots = run("slots", [(engine, w, args.count, seed, loads) for w, seed in places(args)], args.jobs)
    tight_loads = dict.fromkeys(args.memory_loads, BOUND)
    tight = [(small_pool(engine, w, args, seed), w, args.count, seed, tight_loads) for w, seed in places(args)]
    memory = run("memory", tight, args.jobs)
    counts = [1000, 10_000] if args.quick else [1000, 10_000, 100_000]
    found: dict[str, Any] = environment(args.seed) | {
        "engine": dataclasses.asdict(engine),
        "count": args.count,
        "seeds": args.seeds,
        "summaries": [line for baseline in (FCFS, FIRST_FIT) for line in compare(slots, baseline)],
        "memory": [line for baseline in (FCFS, FIRST_FIT) for line in compare(memory, baseline)],
        "overhead": [measure_overhead(name, n, 300) for name in (DEFAULT, "hrrn", FCFS) for n in tqdm(counts, name)],
    }
    found["goals"] = judge(found["summaries"])
    print(show(found, args))
    args.output.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        report.plot(found, args.output.with_suffix(".png"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 0.9, 1.0, 1.2])
    parser.add_argument("--memory-loads", nargs="+", type=float, default=[0.9, 1.1], help="where the pool limits")
    parser.add_argument("--count", type=int, default=1500, help="requests of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--engine", type=Path, help="JSON with per_step, per_token, per_kv, in seconds")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few requests, two workloads")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "scheduling.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.workloads, args.loads, args.memory_loads, args.count, args.seeds = (
            ["tenants", "mixed"],
            [1.0],
            [1.1],
            200,
            1,
        )
    return args


def read_engine(args: argparse.Namespace) -> Engine:
    """The machine: guessed, or with measured times."""
    engine = Engine(slots=args.slots)
    times = json.loads(args.engine.read_text(encoding="utf-8")) if args.engine else {}
    own = {name: float(times[name]) for name in ("per_step", "per_token", "per_kv") if name in times}
    return dataclasses.replace(engine, **own)  # type: ignore[arg-type]  # all three are floats


def places(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Workloads and seeds."""
    return [(name, seed) for name in args.workloads for seed in range(args.seed, args.seed + args.seeds)]


def small_pool(engine: Engine, workload: str, args: argparse.Namespace, seed: int) -> Engine:
    """Four times the slots, and memory for twelve mean requests or the largest one."""
    tokens = [job.prompt + job.output for job in make_jobs(workload, args.count, seed)]
    num_blocks = max(POOL * sum(tokens) // len(tokens), max(tokens) + 1) // engine.block_size + 2
    return dataclasses.replace(engine, slots=4 * engine.slots, num_blocks=num_blocks)


def run(title: str, tasks: list[tuple[Any, ...]], num_jobs: int) -> list[dict[str, Any]]:
    """All lines of all tasks."""
    if num_jobs == 1:
        return [line for task in tqdm(tasks, title) for line in measure(*task)]
    with ProcessPoolExecutor(num_jobs) as pool:
        futures = [pool.submit(measure, *task) for task in tasks]
        return [line for future in tqdm(futures, title) for line in future.result()]


def environment(seed: int) -> dict[str, Any]:
    """What the figures depend on."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version(), "paged_cache": paged_cache.__version__}
    return {"device": f"cpu, {platform.machine()}", "versions": versions, "commit": commit or None, "seed": seed}


def rounded(value: Any) -> Any:
    """The same with four digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show(found: dict[str, Any], args: argparse.Namespace) -> str:
    """Everything, for a terminal."""
    parts = [
        report.table(f"{title}: x {baseline}", [line for line in found[section] if line["baseline"] == baseline])
        for section, title in (("summaries", f"{args.slots} slots"), ("memory", "a pool that limits"))
        for baseline in (FCFS, FIRST_FIT)
        if (section, baseline) != ("summaries", FIRST_FIT)  # with memory for everything both are the same
    ]
    against = [line for line in found["summaries"] if line["baseline"] == FCFS]
    parts.append(report.by_workload(against, 1.0, [DEFAULT, "hrrn", "sjf-no-aging", FREE_SRPT]))
    return "\n\n".join([*parts, report.overhead(found["overhead"]), report.verdicts(found["goals"])])


if __name__ == "__main__":
    main()
