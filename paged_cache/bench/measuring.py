"""How everything is measured: candidates in turns, first whether they are right, then how long they take."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import PagedCacheError
from .results import Case, Line

FEWEST_ROUNDS = 5
MOST_SAMPLES = 50
Samples = dict[str, list[float]]
Tick = Callable[[str], Any]


@dataclass(frozen=True)
class Sample:
    """What one run of a candidate gave: its answer, to be compared, and numbers by metric."""

    answer: Any
    metrics: dict[str, float]


class Candidate(Protocol):
    """Somebody who does what is measured."""

    @property
    def name(self) -> str:
        """In tables."""

    def run(self) -> Sample:
        """Does it once."""


@dataclass(frozen=True)
class Somebody:
    """A candidate made of a function."""

    name: str
    run: Callable[[], Sample]


def timed(call: Callable[[], Any]) -> Callable[[], Sample]:
    """Of a function whose result is the answer: one that also says how long it took, as `elapsed_time`."""

    def run() -> Sample:
        start = time.perf_counter()
        answer = call()
        return Sample(answer, {"elapsed_time": time.perf_counter() - start})

    return run


class WrongAnswerError(PagedCacheError):
    """A candidate of ours differs from the reference: there is nothing to measure."""


class Wrong(Exception):  # noqa: N818 (no error of anybody's: it says why an answer does not count)
    """Raised by a check: why an answer is not that of the reference."""


def same(found: Any, expected: Any) -> None:
    """The usual check.

    Raises:
        Wrong: They are not equal.
    """
    if found != expected:
        raise Wrong(f"got {_short(found)} instead of {_short(expected)}")


@contextmanager
def settled_heap() -> Iterator[None]:
    """Spares the collections between runs the tenths of a second that all of torch and transformers would take.

    Inside another one, or where something else is frozen, it does nothing.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure(
    candidates: Sequence[Candidate],
    ours: Sequence[str],
    case: Case,
    *,
    rounds: int = 3,
    warm_up: int = 1,
    check: Callable[[Any, Any], None] = same,
    answer: Any = None,
    tick: Tick = lambda name: None,
) -> list[Line]:
    """Runs all candidates in turns; every other round starts with the last one.

    Args:
        candidates: The first one is the reference: all answers of all rounds are compared with its first one.
        ours: Names of those of this package.
        case: What is measured, for the lines.
        rounds: That are timed.
        warm_up: Rounds before them, checked like the others, but not timed.
        check: Called with an answer and the reference's; raises `Wrong`.
        answer: The reference's, where it is known already; otherwise the first one.
        tick: Called with a candidate's name before each of its runs.

    Returns:
        A line per candidate. A peer with a wrong answer, or one that fails, has no samples, and a note that says why.

    Raises:
        WrongAnswerError: A candidate of ours is wrong.
        ValueError: No rounds, names that are not different, or a candidate whose metrics change.
        Exception: Whatever a candidate of ours raises, or the reference in its first run.
    """
    _check_arguments([candidate.name for candidate in candidates], rounds, warm_up)
    with settled_heap():
        lines, notes = _turns(candidates, ours, case, rounds, warm_up, check, answer, tick)
    return [Line(case, name, {}, notes[name]) if name in notes else line for name, line in lines.items()]


def _turns(
    candidates: Sequence[Candidate],
    ours: Sequence[str],
    case: Case,
    rounds: int,
    warm_up: int,
    check: Callable[[Any, Any], None],
    answer: Any,
    tick: Tick,
) -> tuple[dict[str, Line], dict[str, str]]:
    """Lines of all candidates, and why some of them have no samples, by name."""
    lines = {candidate.name: Line(case, candidate.name) for candidate in candidates}
    notes: dict[str, str] = {}
    expected: list[Any] = [] if answer is None else [answer]
    for number in range(warm_up + rounds):
        present = [candidate for candidate in candidates if candidate.name not in notes]
        for candidate in present if number % 2 == 0 or not expected else present[::-1]:
            tick(candidate.name)
            gc.collect()  # nobody pays for what the one before left
            try:
                sample = candidate.run()
                expected = expected or [sample.answer]
                check(sample.answer, expected[0])
            except Exception as error:
                if candidate.name in ours or not expected:
                    raise _ours(candidate.name, error) from error
                notes[candidate.name] = _note(error)
                continue
            if number >= warm_up:
                _record(lines[candidate.name], sample)
    return lines, notes


def _check_arguments(names: list[str], rounds: int, warm_up: int) -> None:
    if rounds < 1 or warm_up < 0:
        raise ValueError(f"rounds={rounds} and warm_up={warm_up}: at least 1 and 0 are needed.")
    if len(set(names)) < len(names):
        raise ValueError(f"Candidates need names of their own, not {names}.")


def _record(line: Line, sample: Sample) -> None:
    """Appends a round."""
    if line.metrics and line.metrics.keys() != sample.metrics.keys():
        raise ValueError(f"{line.candidate} has {sorted(sample.metrics)} now, before it had {sorted(line.metrics)}.")
    for metric, value in sample.metrics.items():
        line.metrics.setdefault(metric, []).append(value)


def alternate(
    watches: dict[str, Callable[[], float]], seconds: float, most_samples: int = MOST_SAMPLES, warm_up: int = 1
) -> Samples:
    """Samples of short calls, in turns for about so many seconds, so that a disturbance hits all of them.

    Args:
        watches: By name; each does its work once and returns how long it took. Each round starts with another one, so that
            nobody who follows himself is warmer than the others.
        seconds: At least five rounds are made however long they take.
        most_samples: Where there are more rounds, neighbouring ones are bundled: their median is one sample.
        warm_up: Rounds before, whose samples do not count.
    """
    samples: Samples = {name: [] for name in watches}
    order = list(watches.items())
    for _, watch in order * warm_up:
        watch()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        for name, watch in order:
            samples[name].append(watch())
        order.append(order.pop(0))
        rounds += 1
    return {name: bundle(values, most_samples) for name, values in samples.items()}


def bundle(values: list[float], most_samples: int) -> list[float]:
    """At most so many medians of neighbours."""
    size = -(-len(values) // most_samples)
    return [statistics.median(values[i : i + size]) for i in range(0, len(values), size)]


def _ours(name: str, error: Exception) -> Exception:
    return WrongAnswerError(f"{name}: {error}") if isinstance(error, Wrong) else error


def _note(error: Exception) -> str:
    kind = "WRONG" if isinstance(error, Wrong) else type(error).__name__
    return f"{kind}: {str(error).strip().partition(chr(10))[0]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
