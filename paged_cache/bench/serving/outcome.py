"""What serving a workload once gave."""

from dataclasses import dataclass
from typing import Protocol

from ..workload import Workload


@dataclass(frozen=True)
class Pace:
    """When requests come.

    Attributes:
        arrivals: Seconds from the start, ascending, one per request.
        max_concurrency: Requests that are under way at a time, others wait outside; None for any number.
    """

    arrivals: list[float]
    max_concurrency: int | None = None

    @classmethod
    def at_once(cls, count: int) -> "Pace":
        """All at the start."""
        return cls([0.0] * count)


@dataclass(frozen=True)
class Served:
    """One request.

    Attributes:
        tokens: What was generated.
        times: When each of them was there, seconds from the start of the run.
        arrival: When the request came; where it had to wait for others to end (`max_concurrency`), when it was let in.
    """

    tokens: list[int]
    times: list[float]
    arrival: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.arrival

    @property
    def latency(self) -> float:
        """Seconds until the last one."""
        return self.times[-1] - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first one; 0 if there is none."""
        return (self.latency - self.ttft) / max(1, len(self.tokens) - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Run:
    """All requests of a workload, served once.

    Attributes:
        seconds: Until the last request had its last token.
        requests: In the order of the workload.
        kv_allocated: Bytes of the tensors for K and V: a pool or cache as it was made, or the most that a cache that grows
            had.
        kv_in_use: Bytes of them that requests held at their most: blocks or pages with a token in them counted whole,
            those kept for later prompts only not; None if it cannot be known.
        num_preemptions: How often a request lost its blocks; None if it cannot be known.
        cached_tokens: Prompt tokens that were not computed again.
    """

    seconds: float
    requests: list[Served]
    kv_allocated: int
    kv_in_use: int | None = None
    num_preemptions: int | None = None
    cached_tokens: int = 0

    @property
    def tokens(self) -> list[list[int]]:
        """Of each request."""
        return [request.tokens for request in self.requests]

    @property
    def num_tokens(self) -> int:
        """Generated in all."""
        return sum(map(len, self.tokens))


class Server(Protocol):
    """Somebody who serves requests."""

    @property
    def name(self) -> str:
        """In tables."""

    def describe(self) -> dict[str, object]:
        """Settings."""

    def serve(self, workload: Workload, pace: Pace | None = None) -> Run:
        """Serves all of it; without a pace all requests are there before the clock starts."""
