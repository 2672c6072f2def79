"""One format for everything that is measured: samples of every candidate in every case, and what they depend on."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import PagedCacheError
from .machine import environment as environment

FORMAT = 1
Case = dict[str, Any]
"""What was measured, by name; values are numbers, text, booleans or None."""


class NotResultsError(PagedCacheError, ValueError):
    """A file is not what `Results.save` writes."""


class OtherSettingsError(PagedCacheError, ValueError):
    """Rounds of different settings cannot be added to each other."""


@dataclass(frozen=True)
class Spread:
    """Of samples, or of their ratios."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "Spread":
        """Of at least one number."""
        values = list(numbers)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Line:
    """One candidate in one case.

    Attributes:
        case: What was measured, for example `{"batch": 8, "context": 512}`.
        candidate: Who.
        metrics: By name, a sample per round. Names end with the unit: `_ms`, `_s`, `_bytes`, `_throughput` (a second),
            `_percent`; others are counts.
        note: Why there are no samples: wrong tokens, not installed, out of memory.
        rounds: Which round each sample is from; empty where they are simply the first ones.
    """

    case: Case
    candidate: str
    metrics: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    rounds: list[int] = field(default_factory=list)

    def round_numbers(self) -> list[int]:
        """Of the samples, in their order."""
        return self.rounds or list(range(max(map(len, self.metrics.values()), default=0)))

    def by_round(self, metric: str) -> dict[int, float]:
        """Samples of one metric; empty if there are none.

        Raises:
            ValueError: It has fewer samples than there were rounds, so that nobody knows which ones.
        """
        samples, rounds = self.metrics.get(metric, []), self.round_numbers()
        if samples and len(samples) != len(rounds):
            raise ValueError(f"{self.candidate} has {len(samples)} samples of {metric} in {len(rounds)} rounds.")
        return dict(zip(rounds, samples, strict=False))

    def spread(self, metric: str) -> Spread:
        """Of one metric."""
        return Spread.of(self.metrics[metric])


@dataclass(frozen=True)
class Goal:
    """What a ratio should be: that of `metric`, of `ours` to `peer`, in all cases that have the values of `case`.

    Attributes:
        text: For people.
        metric, ours, peer: See above; without a peer it is the metric itself.
        at_most, at_least: One of them.
        case: Empty for all cases.
        is_stretch: Whether missing it is no failure.
    """

    text: str
    metric: str
    ours: str
    peer: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    case: Case = field(default_factory=dict)
    is_stretch: bool = False

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(
                f"The goal {self.text!r} needs either at_most or at_least, not {self.at_most} and {self.at_least}."
            )

    @property
    def limit(self) -> float:
        """Whichever there is."""
        return self.at_least if self.at_most is None else self.at_most  # type: ignore[return-value]

    def is_met_by(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value >= self.limit if self.at_most is None else value <= self.limit


@dataclass(frozen=True)
class Verdict:
    """A goal, its worst case there was, the median in it, and whether that is good enough."""

    goal: Goal
    case: Case
    value: float
    is_met: bool


@dataclass
class Results:
    """All that one benchmark found.

    Attributes:
        name: Also that of the file.
        title: One line for people.
        command: What was typed.
        environment: See `environment`.
        settings: All else that numbers depend on; rounds of equal settings may be added to each other.
        columns: Metrics that tables show, in this order.
        compared: Metrics whose ratios tables show.
        ours: Candidates of this package; all others are peers.
        lines: Samples.
        goals: What they should be like.
        details: Whatever only this benchmark knows.
    """

    name: str
    title: str
    command: str
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    ours: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def cases(self) -> list[Case]:
        """Each once, in order."""
        found: list[Case] = []
        for line in self.lines:
            if line.case not in found:
                found.append(line.case)
        return found

    def candidates(self) -> list[str]:
        """Each once, in order."""
        return list(dict.fromkeys(line.candidate for line in self.lines))

    def line(self, case: Case, candidate: str) -> Line | None:
        """That of one candidate in one case."""
        return next((line for line in self.lines if line.case == case and line.candidate == candidate), None)

    def ratio(self, case: Case, metric: str, ours: str, peer: str) -> Spread | None:
        """Ours over theirs, of rounds in which both were measured; None where there are none, or they measured 0."""
        lines = [self.line(case, name) for name in (ours, peer)]
        mine, theirs = (line.by_round(metric) if line else {} for line in lines)
        both = [number for number in mine if theirs.get(number)]
        return Spread.of(mine[number] / theirs[number] for number in both) if both else None

    def verdicts(self) -> Iterator[Verdict]:
        """On the goals that something was measured for."""
        for goal in self.goals:
            cases = [case for case in self.cases() if goal.case.items() <= case.items()]
            values = [(value, case) for case in cases if (value := self._value(goal, case)) is not None]
            if values:
                worst = min if goal.at_most is None else max
                value, case = worst(values, key=lambda pair: pair[0])
                yield Verdict(goal, case, value, goal.is_met_by(value))

    def _value(self, goal: Goal, case: Case) -> float | None:
        if goal.peer:
            ratio = self.ratio(case, goal.metric, goal.ours, goal.peer)
            return ratio.median if ratio else None
        line = self.line(case, goal.ours)
        return line.spread(goal.metric).median if line and line.metrics.get(goal.metric) else None

    def add(self, lines: Iterable[Line]) -> None:
        """More rounds, behind those of the same case.

        Samples go behind those of the same candidate. Where one of the two has none, as its note says, the new line
        takes the old one's place: a candidate that was wrong once keeps no times.
        """
        firsts = [(line.case, self._num_rounds(line.case)) for line in self.lines]
        for line in lines:
            first = next((first for case, first in firsts if case == line.case), 0)
            later = replace(line, rounds=[first + number for number in line.round_numbers()] if first else line.rounds)
            known = self.line(line.case, line.candidate)
            if known is None:
                self.lines.append(later)
            else:
                self.lines[self.lines.index(known)] = later if line.note or known.note else _joined(known, later)

    def _num_rounds(self, case: Case) -> int:
        return 1 + max((n for line in self.lines if line.case == case for n in line.round_numbers()), default=-1)

    def add_to(self, earlier: "Results") -> None:
        """Puts these rounds behind those of an earlier run, and takes all of them.

        Raises:
            OtherSettingsError: It was run with other settings.
        """
        both = [_plain(one.settings) for one in (earlier, self)]
        differing = sorted(name for name in both[0].keys() | both[1].keys() if both[0].get(name) != both[1].get(name))
        if differing:
            old, new = ({name: one.get(name) for name in differing} for one in both)
            raise OtherSettingsError(f"Rounds with {new} cannot be added to earlier ones of {self.name} with {old}.")
        new_lines, self.lines = self.lines, earlier.lines
        self.add(new_lines)
        past = earlier.environment.pop("earlier", [])
        if earlier.environment.get("commit") != self.environment.get("commit"):
            past = [*past, earlier.environment]
        self.environment |= {"earlier": past} if past else {}

    def save(self, path: Path) -> Path:
        """Writes the JSON file; its environment lies at the top of it."""
        data = asdict(self)
        environment = data.pop("environment")
        head = {"format": FORMAT} | {name: data.pop(name) for name in ("name", "title", "command")}
        verdicts = [{"text": x.goal.text, "case": x.case, "value": x.value, "met": x.is_met} for x in self.verdicts()]
        text = json.dumps(_plain(head | environment | data | {"verdicts": verdicts}), indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> "Results":
        """What `save` wrote.

        Raises:
            NotResultsError: It is something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            data.pop("verdicts", None)
            parts = {name: data.pop(name) for name in cls.__dataclass_fields__ if name != "environment"}
            parts["lines"] = [Line(**line) for line in parts["lines"]]
            parts["goals"] = [Goal(**goal) for goal in parts["goals"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotResultsError(f"{path} is no file of results in format {FORMAT}.") from error
        return cls(environment=data, **parts)


def _joined(first: Line, second: Line) -> Line:
    metrics = {name: [*first.metrics.get(name, []), *samples] for name, samples in second.metrics.items()}
    return replace(first, metrics=metrics, rounds=[*first.round_numbers(), *second.round_numbers()])


def _plain(value: Any) -> Any:
    """Infinities as text, as JSON has no numbers for them."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)) else value
