"""Requests to be served: traces in `paged_cache/bench/data/`, and seeded generators with published means."""

import csv
import math
import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from paged_cache.bench.workload import TRACES as FOLDER

WINDOW = 60.0  # seconds in which the rate of arrivals is constant


@dataclass(frozen=True)
class Job:
    """A request and what will come of it.

    Attributes:
        prompt, output: Tokens.
        max_new: What it asks for at most.
        hit: Tokens of the prompt that an unbounded prefix cache has.
        tenant: Whose it is.
        time: When it arrives, seconds.
    """

    prompt: int
    output: int
    max_new: int
    hit: int = 0
    tenant: str | None = None
    time: float = 0.0


def lognormal(rng: random.Random, median: float, sigma: float, most: int) -> int:
    """Tokens, 1 to `most`."""
    return max(1, min(most, round(median * math.exp(rng.gauss(0, sigma)))))


def chat(rng: random.Random, count: int) -> list[Job]:
    """ShareGPT: prompts of 350 tokens on average (median 141), outputs of 204; one says nothing of the other."""
    return [Job(lognormal(rng, 141, 1.35, 4096), lognormal(rng, 136, 0.9, 1024), 1024) for _ in range(count)]


def tenants(rng: random.Random, count: int) -> list[Job]:
    """40 clients as in ServeGen: who asks explains most of the length; each has a limit of its own."""
    return clients(rng, count, 40, prompt=(267, 1.0, 0.6), output=(50, 1.35, 0.75), limit=None)


def reason(rng: random.Random, count: int) -> list[Job]:
    """20 clients of a model that thinks aloud: outputs of 867 tokens (median), 8192 at most."""
    return clients(rng, count, 20, prompt=(380, 1.2, 1.1), output=(867, 0.85, 0.8), limit=8192)


def clients(
    rng: random.Random,
    count: int,
    num_clients: int,
    prompt: tuple[float, float, float],
    output: tuple[float, float, float],
    limit: int | None,
) -> list[Job]:
    """Zipf(1.2) clients; prompts and outputs have a median, a sigma between clients and one within."""
    ends = list(accumulate(1 / rank**1.2 for rank in range(1, num_clients + 1)))
    places = [
        (prompt[0] * math.exp(rng.gauss(0, prompt[1])), output[0] * math.exp(rng.gauss(0, output[1]))) for _ in ends
    ]
    jobs = []
    for _ in range(count):
        client = bisect_left(ends, rng.random() * ends[-1])
        most = limit or min(4096, 2 ** math.ceil(math.log2(max(16.0, 3 * places[client][1]))))
        lengths = lognormal(rng, places[client][0], prompt[2], 8192), lognormal(rng, places[client][1], output[2], most)
        jobs.append(Job(*lengths, most, tenant=f"client {client}"))
    return jobs


def mixed(rng: random.Random, count: int) -> list[Job]:
    """Four of five requests are chat (120 tokens in, 60 out), the fifth is long (1500, 700)."""
    kinds = [("chat", 120, 60, 256)] * 4 + [("long", 1500, 700, 2048)]
    drawn = [rng.choice(kinds) for _ in range(count)]
    sigma = 0.6
    scale = math.exp(-(sigma**2) / 2)  # from means to medians
    return [
        Job(lognormal(rng, p * scale, sigma, 8192), lognormal(rng, o * scale, sigma, most), most, tenant=name)
        for name, p, o, most in drawn
    ]


@cache
def trace(name: str, max_new: int) -> list[Job]:
    """All of a trace, with its own times."""
    with (FOLDER / f"{name}_4500.csv").open(encoding="utf-8") as file:
        return [
            Job(int(row["prompt"]), int(row["output"]), max_new, int(row.get("hit") or 0), time=float(row["t"]))
            for row in csv.DictReader(file)
        ]


TRACES = {
    "azure_conv": ("azure23_conv", 1024),
    "azure_code": ("azure23_code", 1024),
    "mooncake": ("mooncake_conv", 2048),
}
GENERATORS: dict[str, tuple[Callable[[random.Random, int], list[Job]], float]] = {
    "sharegpt": (chat, 0.25),
    "tenants": (tenants, 0.5),
    "reason": (reason, 0.25),
    "mixed": (mixed, 0.25),
}
WORKLOADS = [*TRACES, *GENERATORS]


def make_jobs(name: str, count: int, seed: int) -> list[Job]:
    """Requests without their times, or with those of the trace; the same from the same seed."""
    if name in TRACES:
        jobs = trace(*TRACES[name])
        start = seed * count % max(1, len(jobs) - count + 1) if seed * count + count > len(jobs) else seed * count
        return jobs[start : start + count]
    return GENERATORS[name][0](random.Random(f"{name} {seed}"), count)


def arrive(name: str, jobs: list[Job], rate: float, seed: int) -> list[Job]:
    """The same requests at so many a second: a trace stretched, or Poisson with a rate that changes every minute."""
    if name in TRACES:
        first, last = jobs[0].time, jobs[-1].time
        times = [(job.time - first) / (last - first) * len(jobs) / rate for job in jobs]
    else:
        times = poisson(random.Random(f"arrivals {name} {seed}"), len(jobs), rate, GENERATORS[name][1])
    return [replace(job, time=time) for job, time in zip(jobs, times, strict=True)]


def poisson(rng: random.Random, count: int, rate: float, variation: float) -> list[float]:
    """Times of arrivals, scaled to the mean rate; the rate of each window is gamma distributed."""
    times: list[float] = []
    start, shape = 0.0, variation**-2
    while len(times) < count:
        here = rate * rng.gammavariate(shape, 1 / shape)
        time = rng.expovariate(here)
        while time < WINDOW:
            times.append(start + time)
            time += rng.expovariate(here)
        start += WINDOW
    scale = count / rate / times[count - 1]
    return [time * scale for time in times[:count]]
