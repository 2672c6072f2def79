"""Candidates in turns over one workload: first whether they are right, then how long they take."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from paged_cache.bench.workload import Workload

from .outcome import Run

CHECKED = 8  # requests of the round that warms up and checks
OURS = ("fcfs", "sjf")
Metrics = dict[str, Any]
Round = dict[str, Metrics]
"""By candidate: what one run gave."""


class Candidate(Protocol):
    """Somebody who serves requests."""

    @property
    def name(self) -> str:
        """In tables."""

    def describe(self) -> dict[str, Any]:
        """Settings."""

    def run(self, workload: Workload) -> Run:
        """Serves all of it."""


@dataclass(frozen=True)
class Spread:
    """Of some rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "Spread":
        """Of at least one number."""
        values = list(numbers)
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Comparison:
    """One workload and all rounds over it.

    Attributes:
        line: What the workload is.
        num_shared: Tokens that all prompts start with.
        num_prompt_tokens: Of all requests.
        candidates: Settings, by name.
        rounds: Each has the metrics of all candidates that were right in it.
    """

    line: str
    num_shared: int
    num_prompt_tokens: int
    candidates: dict[str, dict[str, Any]]
    rounds: list[Round] = field(default_factory=list)

    def names(self) -> list[str]:
        """Candidates that were right in all rounds."""
        return [name for name in self.candidates if all(name in one and "seconds" in one[name] for one in self.rounds)]

    def spread(self, name: str, metric: str) -> Spread:
        """Of one candidate."""
        return Spread.of(one[name][metric] for one in self.rounds)

    def ratio(self, name: str, other: str) -> Spread:
        """Of the tokens per second of two candidates in the same round."""
        return Spread.of(one[name]["tokens_per_second"] / one[other]["tokens_per_second"] for one in self.rounds)

    def equal(self, name: str) -> int:
        """Requests with the reference's tokens, in the worst round."""
        return min(int(one[name]["num_equal"]) for one in self.rounds if name in one)


class WrongTokensError(Exception):
    """A candidate of ours differs from the reference."""


@torch.no_grad()
def play(candidates: list[Candidate], workload: Workload, is_exact: bool, is_odd: bool, tick: Any) -> Round:
    """One round: the first candidate is the reference, the others come in turns, in odd rounds the last one first.

    Args:
        candidates: Who.
        workload: What.
        is_exact: Whether equal tokens can be expected of this model: then whoever has others gets no times.
        is_odd: See above.
        tick: Called with a name before each run.

    Raises:
        WrongTokensError: It is one of ours.
    """
    reference, *others = candidates
    expected: list[list[int]] = []
    result: Round = {}
    for candidate in [reference, *(others[::-1] if is_odd else others)]:
        tick(candidate.name)
        run = candidate.run(workload)
        found = [request.tokens for request in run.requests]
        expected = expected or found
        result[candidate.name] = _judge(candidate, run, found, expected, is_exact)
    return {candidate.name: result[candidate.name] for candidate in candidates}


def _judge(
    candidate: Candidate, run: Run, found: list[list[int]], expected: list[list[int]], is_exact: bool
) -> Metrics:
    """What a run gave, but nothing except the count where tokens are wrong."""
    wrong = [i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs]
    num_equal = len(expected) - len(wrong)
    if wrong and is_exact:
        if candidate.name in OURS:
            raise WrongTokensError(
                f"{candidate.name}: {_first_difference(wrong[0], found, expected)}; {len(wrong)} in all"
            )
        return {"num_equal": num_equal}
    return {"num_equal": num_equal, **run.to_json()}


def _first_difference(request: int, found: list[list[int]], expected: list[list[int]]) -> str:
    ours, theirs = found[request], expected[request]
    if len(ours) != len(theirs):
        return f"request {request} has {len(ours)} tokens instead of {len(theirs)}"
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"request {request} differs at its token {at}: {ours[at]} instead of {theirs[at]}"
