"""One format for everything that is measured: samples of every candidate in every case, and what they depend on."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
LIBRARIES = ("paged-cache", "torch", "transformers", "triton", "numba", "peft", "accelerate")
Case = dict[str, Any]


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
    """

    case: Case
    candidate: str
    metrics: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

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
        """Ours over theirs, of the same rounds; None where one of them has no samples."""
        lines = [self.line(case, name) for name in (ours, peer)]
        if not all(line and line.metrics.get(metric) for line in lines):
            return None
        mine, theirs = (line.metrics[metric] for line in lines if line)
        return Spread.of(a / b for a, b in zip(mine, theirs, strict=True))

    def verdicts(self) -> Iterator[Verdict]:
        """On the goals that something was measured for."""
        for goal in self.goals:
            cases = [case for case in self.cases() if goal.case.items() <= case.items()]
            values = [(value, case) for case in cases if (value := self._value(goal, case)) is not None]
            if values:
                pick = max if goal.at_most is not None else min
                value, case = pick(values, key=lambda pair: pair[0])
                limit = goal.at_most if goal.at_most is not None else goal.at_least
                assert limit is not None, f"the goal {goal.text!r} needs at_most or at_least"
                yield Verdict(goal, case, value, value <= limit if goal.at_most is not None else value >= limit)

    def _value(self, goal: Goal, case: Case) -> float | None:
        if goal.peer:
            ratio = self.ratio(case, goal.metric, goal.ours, goal.peer)
            return ratio.median if ratio else None
        line = self.line(case, goal.ours)
        return line.spread(goal.metric).median if line and line.metrics.get(goal.metric) else None

    def add(self, lines: Iterable[Line]) -> None:
        """More rounds: samples go behind those of the same case and candidate, if there are any."""
        for line in lines:
            known = self.line(line.case, line.candidate)
            if known is None:
                self.lines.append(line)
                continue
            for metric, samples in line.metrics.items():
                known.metrics.setdefault(metric, []).extend(samples)

    def save(self, path: Path) -> Path:
        """Writes the JSON file; its environment lies at the top of it."""
        data = asdict(self)
        environment = data.pop("environment")
        head = {"format": FORMAT} | {name: data.pop(name) for name in ("name", "title", "command")}
        verdicts = [{"text": x.goal.text, "case": x.case, "value": x.value, "met": x.is_met} for x in self.verdicts()]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(head | environment | data | {"verdicts": verdicts}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> "Results":
        """What `save` wrote.

        Raises:
            ValueError: It is something else.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is no file of results in format {FORMAT}.")
        names = set(cls.__dataclass_fields__) - {"environment"}
        parts = {name: data.pop(name) for name in names & data.keys()}
        for name in ("format", "verdicts"):
            data.pop(name)
        parts["lines"] = [Line(**line) for line in parts["lines"]]
        parts["goals"] = [Goal(**goal) for goal in parts["goals"]]
        return cls(environment=data, **parts)


def environment(seed: int, device: str = "cpu") -> dict[str, Any]:
    """Device, threads, load of the machine, versions, commit (None outside a checkout) and seed."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {platform.machine()}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "seed": seed,
    }


def _versions() -> dict[str, str]:
    found = {name: list(importlib.metadata.distributions(name=name)) for name in LIBRARIES}
    return {name: installed[0].version for name, installed in found.items() if installed}


def _commit() -> str | None:
    """Of the checkout that this file is in; `-dirty` behind it if something else ran."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
