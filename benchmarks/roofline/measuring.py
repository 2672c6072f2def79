"""One shape: check every candidate, then let them run in turns."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .candidates import FAR_BYTES, OPPONENT, PAGED, READ, Candidate, Setting, candidates, plain_read, refusal
from .machines import MAX_LAYERS, Machine, Stopwatch, poisoned_memory
from .problem import TOLERANCE, Problem, needed_bytes
from .shapes import MEMORY_BOUND, Shape

FEWEST_ROUNDS = 5
READ_FROM_MEMORY = ("decode", "scattered")  # sections whose large lines are compared with a plain read


@dataclass(frozen=True)
class Spread:
    """Of times in microseconds, or of their ratios."""

    fastest: float
    quartile_1: float
    median: float
    quartile_3: float

    @classmethod
    def of(cls, numbers: list[float]) -> "Spread":
        """Of at least two numbers."""
        return cls(min(numbers), *statistics.quantiles(numbers, n=4))


@dataclass(frozen=True)
class Result:
    """What a shape took.

    Attributes:
        kv_bytes, nbytes, flops: See `Shape`.
        num_layers: How many took turns.
        rounds: How often each candidate was timed.
        times: Microseconds by candidate.
        ratios: By peer, its time over that of ours in the same round: above 1 ours is faster. That of a plain read of
            as many bytes is the share of its bandwidth.
        eager: Microseconds by candidate, without a CUDA graph.
        errors: By candidate, of the norm of the right answer.
        missing: Candidates that gave no times, and why.
    """

    shape: Shape
    kv_bytes: int
    nbytes: int
    flops: int
    num_layers: int
    rounds: int = 0
    times: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """GB/s of K and V, in the median."""
        return self.kv_bytes / self.times[PAGED].median / 1e3

    @property
    def gflops(self) -> float:
        """GFLOP/s, in the median."""
        return self.flops / self.times[PAGED].median / 1e3

    def to_json(self) -> dict[str, Any]:
        """With the name of the line."""
        return {"line": str(self.shape), **asdict(self)}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Result":
        """The inverse of `to_json`."""
        line = {name: value for name, value in line.items() if name != "line"}
        shape = {"extent": 1, **line["shape"]}  # older files do not say it: their blocks were in random order
        line["shape"] = Shape(**{**shape, "first": shape["first"] and tuple(shape["first"])})
        spreads = {of: {name: Spread(**x) for name, x in line[of].items()} for of in ("times", "ratios")}
        return cls(**{**line, **spreads})


@torch.no_grad()
def measure(machine: Machine, shape: Shape, settings: list[Setting], seconds: float, max_bytes: int) -> Result:
    """Times all candidates for about so many seconds. Whoever gives a wrong answer, or none, is left out with the reason.

    Args:
        machine: Where.
        shape: What.
        settings: Variants of ours.
        seconds: For the timed rounds, at least five; building and checking comes on top.
        max_bytes: Memory that may be used.
    """
    num_layers = min(MAX_LAYERS, -(-4 * machine.cache_bytes // shape.kv_bytes)) if machine.is_cold else 1
    result = Result(shape, shape.kv_bytes, shape.nbytes, shape.flops, num_layers)
    needed = needed_bytes(shape, num_layers, machine.device == "cpu")
    if needed > max_bytes:
        result.missing[PAGED] = f"needs {needed / 2**30:.1f} GiB, {max_bytes / 2**30:.1f} are there"
        return result
    try:
        problem = Problem(shape, machine.device, num_layers)
    except torch.OutOfMemoryError as error:
        result.missing[PAGED] = str(error).splitlines()[0]
        return result
    if reason := refusal(problem):
        result.missing[PAGED] = f"the fast kernel does not take it: {reason}"
        return result
    watches = _checked(machine, problem, settings, result)
    if machine.device == "cpu" and shape.section in READ_FROM_MEMORY and shape.kv_bytes >= MEMORY_BOUND:
        read, *_ = machine.stopwatch(plain_read(problem), num_layers)
        watches[READ] = lambda: read() * shape.kv_bytes / FAR_BYTES
    samples = alternate(watches, seconds) if PAGED in watches else {}
    times = {name: Spread.of([1e6 * x for x in values]) for name, values in samples.items()}
    ratios = {
        peer: Spread.of([theirs / ours for theirs, ours in zip(samples[peer], samples[mine], strict=True)])
        for peer in samples
        if (mine := OPPONENT.get(peer, PAGED)) in samples and peer not in OPPONENT.values()
    }
    rounds = len(samples.get(PAGED, []))
    return Result(**{**vars(result), "rounds": rounds, "times": times, "ratios": ratios})


def alternate(watches: dict[str, Stopwatch], seconds: float) -> dict[str, list[float]]:
    """Samples of all candidates, in turns, so that a disturbance hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in watches}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        for name, watch in watches.items():
            samples[name].append(watch())
        rounds += 1
    return samples


def _checked(machine: Machine, problem: Problem, settings: list[Setting], result: Result) -> dict[str, Stopwatch]:
    """A stopwatch for each candidate that gives the right answer."""
    watches = {
        name: _check(machine, problem, make, name, result) for name, make in candidates(problem, settings).items()
    }
    return {name: watch for name, watch in watches.items() if watch}


def _check(
    machine: Machine, problem: Problem, make: Callable[[], Candidate], name: str, result: Result
) -> Stopwatch | None:
    """Compares what a candidate computes, before and in what is timed; notes what comes of it in the result."""
    try:
        candidate = make()
        with poisoned_memory():
            errors = [problem.error(candidate(0), 0)]
        watch, output, layer = machine.stopwatch(candidate, problem.num_layers)
        errors.append(problem.error(output, layer))
        eager = machine.eager(candidate, problem.num_layers)
    except Exception as error:  # noqa: BLE001 - one that fails must not cost the rest of a long run
        result.missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None
    result.errors[name] = max(errors)
    if not all(error <= TOLERANCE[problem.shape.torch_dtype] for error in errors):
        result.missing[name] = f"WRONG by {errors} of the right answer's norm: no times for wrong results"
        return None
    if eager is not None:
        result.eager[name] = 1e6 * eager
    return watch
