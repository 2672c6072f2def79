"""One shape: check every candidate, then let them run in turns."""

from collections.abc import Callable

import torch

from ..measuring import alternate
from .candidates import FAR_BYTES, PAGED, READ, Candidate, Setting, candidates, plain_read, refusal
from .machines import MAX_LAYERS, Machine, Stopwatch, poisoned_memory
from .problem import TOLERANCE, Problem, needed_bytes
from .shapes import MEMORY_BOUND, Shape
from .timing import Timing

EVERY = 2**31  # samples: ratios are those of single rounds
READ_FROM_MEMORY = ("decode", "scattered")  # sections whose large lines are compared with a plain read


@torch.no_grad()
def measure(machine: Machine, shape: Shape, settings: list[Setting], seconds: float, max_bytes: int) -> Timing:
    """Times all candidates for about so many seconds. Whoever gives a wrong answer, or none, is left out with the reason.

    Args:
        machine: Where.
        shape: What.
        settings: Variants of ours.
        seconds: For the timed rounds, at least five; building and checking comes on top.
        max_bytes: Memory that may be used.
    """
    num_layers = min(MAX_LAYERS, -(-4 * machine.cache_bytes // shape.kv_bytes)) if machine.is_cold else 1
    result = Timing(shape, num_layers)
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
    if PAGED not in watches:
        return result
    return result.with_samples(alternate(watches, seconds, most_samples=EVERY))


def _checked(machine: Machine, problem: Problem, settings: list[Setting], result: Timing) -> dict[str, Stopwatch]:
    """A stopwatch for each candidate that gives the right answer."""
    watches = {
        name: _check(machine, problem, make, name, result) for name, make in candidates(problem, settings).items()
    }
    return {name: watch for name, watch in watches.items() if watch}


def _check(
    machine: Machine, problem: Problem, make: Callable[[], Candidate], name: str, result: Timing
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
