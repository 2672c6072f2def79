"""What serving a workload once gave."""

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Served:
    """One request.

    Attributes:
        tokens: What was generated.
        ttft: Seconds from the start until the first token.
        latency: Seconds from the start until the last one.
    """

    tokens: list[int]
    ttft: float
    latency: float

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first one."""
        return (self.latency - self.ttft) / max(1, len(self.tokens) - 1)


@dataclass(frozen=True)
class Run:
    """All requests of a workload, served once.

    Attributes:
        seconds: Until the last request had its last token.
        requests: In the order of the workload.
        kv_bytes: Most K and V held at a time, or allocated where that is fixed.
        num_preemptions: How often a request lost its blocks; None if it cannot be known.
        prefix_hits: Prompt tokens that were not computed again.
    """

    seconds: float
    requests: list[Served]
    kv_bytes: int
    num_preemptions: int | None = None
    prefix_hits: int = 0

    @property
    def num_tokens(self) -> int:
        """Generated in all."""
        return sum(len(request.tokens) for request in self.requests)

    @property
    def tokens_per_second(self) -> float:
        """Generated ones."""
        return self.num_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Without the tokens."""
        latencies = [request.latency for request in self.requests]
        ttfts, tpots = ([getattr(r, name) for r in self.requests] for name in ("ttft", "tpot"))
        return {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "latency_mean": statistics.fmean(latencies),
            "latency_p50": statistics.median(latencies),
            "latency_p99": percentile(latencies, 99),
            "ttft_mean": statistics.fmean(ttfts),
            "ttft_p99": percentile(ttfts, 99),
            "tpot_mean": statistics.fmean(tpots),
            "kv_bytes": self.kv_bytes,
            "num_preemptions": self.num_preemptions,
            "prefix_hits": self.prefix_hits,
        }


def percentile(values: list[float], percent: int) -> float:
    """Between the nearest values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
