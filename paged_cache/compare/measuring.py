"""The plan of all measurements, and what comes of it: one `Results` with the cases of three parts."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..bench.measuring import Candidate, Sample, Tick, Wrong, measure, settled_heap
from ..bench.results import Case, Line, Results, environment
from . import caches, concurrency
from .caches import CACHES, Alone
from .subject import Subject

NUM_NEW_OF_CONTEXTS = 16
"""Most tokens that follow a prompt whose latency is measured."""
IDENTICAL = "identical_percent"
BATCH, CONTEXT, CONCURRENCY = "batch_size", "context", "concurrency"


@dataclass(frozen=True)
class Section:
    """A table.

    Attributes:
        key: Its part: the name that cases have.
        title: Above it.
        columns: Metrics.
    """

    key: str
    title: str
    columns: tuple[str, ...]


SECTIONS = {
    "time": Section(BATCH, "One batch, each cache: time", ("mean_ttft_ms", "mean_tpot_ms")),
    "memory": Section(
        BATCH, "One batch, each cache: memory for K and V", ("reserved_bytes", "used_bytes", "wasted_bytes")
    ),
    "context": Section(
        CONTEXT, "One prompt of each length, each cache", ("mean_ttft_ms", "mean_tpot_ms", "reserved_bytes")
    ),
    "concurrency": Section(
        CONCURRENCY,
        "Many requests, each way to serve them",
        (
            "output_throughput",
            "mean_e2el_ms",
            "p99_e2el_ms",
            "mean_ttft_ms",
            "kv_allocated_bytes",
            "peak_kv_in_use_bytes",
        ),
    ),
}
"""Tables, by name."""
COMPARED = {
    "time": "mean_tpot_ms",
    "memory": "reserved_bytes",
    "context": "mean_tpot_ms",
    "concurrency": "output_throughput",
}
"""The metric of each whose ratios are shown."""


@dataclass
class Phase:
    """One case, measured at a time.

    Attributes:
        case: Of the lines.
        candidates: All but the reference.
        reference: The right answers.
        rounds, warm_up: See `measure`.
        is_timed: Otherwise bytes are all that is kept.
        is_exact: Whether other tokens are a fault.
    """

    case: Case
    candidates: Sequence[Candidate]
    reference: Candidate
    rounds: int
    warm_up: int
    is_timed: bool = True
    is_exact: bool = True

    @property
    def num_runs(self) -> int:
        """For a progress bar."""
        return (len(self.candidates) + 1) * (self.rounds + self.warm_up)

    def run(self, tick: Tick) -> list[Line]:
        """Lines of the candidates; one that fails or is wrong has a note instead of samples, whoever it is."""
        expected: list[list[int]] = self.reference.run().answer
        judged = [Judged(candidate, expected, self.is_timed) for candidate in self.candidates]
        check = require_same if self.is_exact else lambda found, expected: None
        lines = measure(
            [self.reference, *judged], (), self.case, rounds=self.rounds, warm_up=self.warm_up, check=check, tick=tick
        )
        return [line for line in lines if line.candidate != self.reference.name]


@dataclass
class Judged:
    """A candidate, and how many of its rows are right; without times if they mean nothing."""

    candidate: Candidate
    expected: list[list[int]]
    is_timed: bool

    @property
    def name(self) -> str:
        """The candidate's."""
        return self.candidate.name

    def run(self) -> Sample:
        """Its sample, with one number more."""
        sample = self.candidate.run()
        same = [found == row[: len(found)] for found, row in zip(sample.answer, self.expected, strict=True)]
        metrics = {name: x for name, x in sample.metrics.items() if self.is_timed or name.endswith("_bytes")}
        return Sample(sample.answer, metrics | {IDENTICAL: 100 * sum(same) / len(same)})


def require_same(found: list[list[int]], expected: list[list[int]]) -> None:
    """The check in 32 bits. A candidate may generate fewer tokens, not others.

    Raises:
        Wrong: The first row that differs, and where.
    """
    for number, (row, right) in enumerate(zip(found, expected, strict=True)):
        if not row or row != right[: len(row)]:
            at = next((i for i, pair in enumerate(zip(row, right, strict=False)) if pair[0] != pair[1]), len(right))
            raise Wrong(f"row {number} differs from new token {at} on: {row[at : at + 4]}, not {right[at : at + 4]}")


@dataclass
class Comparison:
    """All measurements on one model.

    Attributes:
        left_out: What is not measured, and why.
    """

    subject: Subject
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.subject.settings
        self.left_out |= concurrency.left_out(settings)
        sizes = sorted({1 << i for i in range(settings.rows.bit_length())} | {settings.rows})
        self.batches = [self._batch(size) for size in sizes if size <= settings.rows]
        self.contexts = [self._context(length) for length in sorted(set(settings.contexts)) if self._fits(length)]
        self.requests = [self._requests(count) for count in sorted(set(settings.concurrency))]

    @property
    def num_runs(self) -> int:
        """For a progress bar."""
        return sum(phase.num_runs for phase in [*self.batches, *self.contexts, *self.requests])

    def run(
        self, command: str, tick: Tick = lambda name: None, skip: Callable[[int], Any] = lambda runs: None
    ) -> Results:
        """Measures everything.

        Args:
            command: What was typed.
            tick: Called with a candidate's name before each of its runs.
            skip: Called with the number of runs that are left out.
        """
        settings = self.subject.settings
        results = Results(
            "compare",
            f"KV caches and ways to serve on {settings.to_json()['model']}",
            command,
            environment(settings.seed, settings.device),
            settings.to_json() | {"parameters": self.subject.model.num_parameters()},
            columns=list(dict.fromkeys([name for one in SECTIONS.values() for name in one.columns] + [IDENTICAL])),
            ours=[*OURS],
        )
        with settled_heap():
            for phase in self.batches:
                results.add(phase.run(tick))
            results.add(self._sweep(tick, skip))
            for phase in self.requests:
                results.add(phase.run(tick))
        results.details = {"left_out": self.left_out, "prompt_lengths": [len(row) for row in self.subject.prompts]}
        return results

    def _sweep(self, tick: Tick, skip: Callable[[int], Any]) -> list[Line]:
        """Prompts of one length after the other, until the next would take too long; time grows a bit faster than length."""
        lines: list[Line] = []
        end, before, seconds = time.perf_counter() + self.subject.settings.time_budget, 0, 0.0
        for phase in self.contexts:
            context = int(phase.case[CONTEXT])
            expected = seconds * (context / before) ** 1.5 if before else 0.0
            if time.perf_counter() + expected > end:
                self.left_out[f"context {context}"] = f"would take about {expected:.0f} s; give a larger --time-budget"
                skip(phase.num_runs)
                continue
            start = time.perf_counter()
            lines += phase.run(tick)
            before, seconds = context, time.perf_counter() - start
        return lines

    def _fits(self, length: int) -> bool:
        limit = self.subject.context
        fits = limit is None or length + 2 <= limit
        if not fits:
            self.left_out[f"context {length}"] = f"the model reads {limit} tokens at most"
        return fits

    def _batch(self, size: int) -> Phase:
        """The largest one is measured often; smaller ones show their memory, which does not change."""
        settings, rows = self.subject.settings, self.subject.prompts[:size]
        is_largest = size == settings.rows
        chosen = CACHES if is_largest else CACHES[1:]
        candidates = [kind(self.subject, rows, settings.max_new_tokens) for kind in chosen]
        reference = Alone(self.subject, rows, [settings.max_new_tokens] * size)
        rounds, warm_up = (settings.rounds, 1) if is_largest else (1, 0)
        return Phase({BATCH: size}, candidates, reference, rounds, warm_up, is_largest, settings.is_exact)

    def _context(self, length: int) -> Phase:
        settings, limit = self.subject.settings, self.subject.context
        num_new = min(settings.max_new_tokens, NUM_NEW_OF_CONTEXTS, limit - length if limit else NUM_NEW_OF_CONTEXTS)
        rows = [self.subject.texts.long_prompt(length)]
        candidates = [kind(self.subject, rows, num_new) for kind in CACHES]
        reference = Alone(self.subject, rows, [num_new])
        return Phase({CONTEXT: length}, candidates, reference, settings.rounds, 1, is_exact=settings.is_exact)

    def _requests(self, count: int) -> Phase:
        settings, workload = self.subject.settings, concurrency.make_workload(self.subject, count)
        candidates = concurrency.servings(self.subject, workload)
        reference = Alone(self.subject, workload.prompts, workload.num_new)
        return Phase({CONCURRENCY: count}, candidates, reference, settings.rounds, 1, is_exact=settings.is_exact)


OURS = (caches.Paged.name, *concurrency.OURS)


def part(results: Results, key: str) -> Results:
    """The lines of one part: `BATCH`, `CONTEXT` or `CONCURRENCY`."""
    return _only(results, [line for line in results.lines if key in line.case])


def section(results: Results, name: str) -> Results:
    """What the table of this name is about: only lines that have its numbers, or a note instead, and its columns."""
    about = SECTIONS[name]
    found = part(results, about.key)
    lines = [line for line in found.lines if line.note or about.columns[0] in line.metrics]
    return replace(_only(found, lines), columns=[*about.columns, IDENTICAL], compared=[COMPARED[name]])


def _only(results: Results, lines: list[Line]) -> Results:
    ours = [name for name in results.ours if any(line.candidate == name for line in lines)]
    return replace(results, lines=lines, ours=ours)


def faults(results: Results) -> list[str]:
    """What is wrong with ours, each once: other tokens than the reference's, or an error."""
    notes = Counter((line.candidate, line.note) for line in results.lines if line.note and line.candidate in OURS)
    return [f"{name}: {note} (in {count} cases)" for (name, note), count in notes.items()]
