"""What the scheduler itself costs: microseconds of a step."""

import random
import time
from statistics import median

from ...batching.request import Request
from ...batching.scheduler import Scheduler
from .simulator import SimulatedMemory, SimulatedRow

SLOTS = 32


def _request(rng: random.Random, name: str) -> Request:
    request = Request(name, range(rng.randint(1, 200)), 1000, expected_tokens=rng.randint(1, 1000))
    request.rows = [SimulatedRow(request.num_prompt_tokens)]  # type: ignore[list-item]  # it counts tokens and has none
    return request


def _compute(scheduler: Scheduler, memory: SimulatedMemory) -> float:
    """One step; returns the seconds of its plan."""
    start = time.perf_counter()
    plan = scheduler.schedule()
    seconds = time.perf_counter() - start
    for _, row, num_tokens in plan.chunks:
        memory.compute(row, num_tokens)
        if row.num_computed == row.num_tokens:
            row.num_tokens += 1  # type: ignore[misc]  # as above
    return seconds


def measure_overhead(policy: str, num_waiting: int, num_rounds: int) -> dict[str, float | str]:
    """Microseconds (median) of steps with 32 rows and so many requests waiting.

    `decode`: nobody comes or goes. `admit`: a request ended, one is admitted. `add`: a request arrives.
    """
    rng, memory, now = random.Random(0), SimulatedMemory(2**24, 16, {}), 0.0
    scheduler = Scheduler(memory, policy=policy, max_num_seqs=SLOTS, max_num_batched_tokens=10**6, clock=lambda: now)
    for i in range(num_waiting + SLOTS):
        now = i * 1e-3
        request = _request(rng, str(i))
        request.arrival_time = now
        scheduler.add(request)
    for _ in range(3):
        _compute(scheduler, memory)
    times: dict[str, list[float]] = {"decode": [], "admit": [], "add": []}
    for i in range(num_rounds):
        times["decode"].append(_compute(scheduler, memory))
        now += 1e-3
        scheduler.remove(scheduler.running[rng.randrange(SLOTS)])
        times["admit"].append(_compute(scheduler, memory))
        request = _request(rng, f"more {i}")
        request.arrival_time = now
        start = time.perf_counter()
        scheduler.add(request)
        times["add"].append(time.perf_counter() - start)
    found: dict[str, float | str] = {"policy": policy, "num_waiting": num_waiting}
    return found | {name: 1e6 * median(values) for name, values in times.items()}
