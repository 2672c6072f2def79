"""What a shape took, and how that is written down."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from ..measuring import bundle
from ..results import Case, Line, Spread
from .candidates import OPPONENT, PAGED, READ
from .shapes import Shape

TIME = "call_us"
MOST_SAMPLES = 8  # that are written down, each the median of neighbouring rounds
NOT_TIMED = "no times"


@dataclass(frozen=True)
class Timing:
    """One shape, all candidates.

    Attributes:
        num_layers: How many took turns.
        rounds: How often each candidate was timed.
        times: Microseconds by candidate: the median of all rounds.
        samples: The same in the course of time, a few numbers.
        ratios: By peer, its time over that of ours in the same round: above 1 ours is faster. That of a plain read of
            as many bytes is the share of its bandwidth.
        eager: Microseconds by candidate, without a CUDA graph.
        errors: By candidate, of the norm of the right answer.
        missing: Candidates that gave no times, and why.
    """

    shape: Shape
    num_layers: int = 1
    rounds: int = 0
    times: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """GB/s of K and V, in the median."""
        return self.shape.kv_bytes / self.times[PAGED] / 1e3

    @property
    def gflops(self) -> float:
        """GFLOP/s, in the median."""
        return self.shape.flops / self.times[PAGED] / 1e3

    @property
    def case(self) -> Case:
        """Of its lines."""
        return {"section": self.shape.section, "shape": str(self.shape)}

    def with_samples(self, seconds: dict[str, list[float]]) -> "Timing":
        """The same with what was measured: seconds by candidate, a number per round."""
        times = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
        samples = {name: [1e6 * x for x in bundle(values, MOST_SAMPLES)] for name, values in seconds.items()}
        ratios = {
            peer: Spread.of(theirs / ours for theirs, ours in zip(seconds[peer], seconds[mine], strict=True))
            for peer in seconds
            if (mine := OPPONENT.get(peer, PAGED)) in seconds and peer not in OPPONENT.values()
        }
        rounds = len(seconds.get(PAGED, []))
        return Timing(**{**vars(self), "rounds": rounds, "times": times, "samples": samples, "ratios": ratios})

    def lines(self, limit: float) -> list[Line]:
        """One per candidate. `limit` is the bandwidth in GB/s that shares are of, where no plain read was timed with them."""
        lines = [Line(self.case, name, {TIME: short(samples)}) for name, samples in self.samples.items()]
        for line in lines:
            if line.candidate in self.eager:
                line.metrics["eager_us"] = short([self.eager[line.candidate]])
            if line.candidate == PAGED:
                line.metrics.update({name: short([value]) for name, value in self._rates(limit).items()})
        return lines + [Line(self.case, name, {}, why) for name, why in self.missing.items()]

    def _rates(self, limit: float) -> dict[str, float]:
        share = self.ratios[READ].median if READ in self.ratios else self.bandwidth / limit
        return {"gb_throughput": self.bandwidth, "bandwidth_percent": 100 * share, "gflop_throughput": self.gflops}

    def to_json(self) -> dict[str, Any]:
        """All that lines do not say."""
        found = {name: value for name, value in asdict(self).items() if name not in ("samples", "missing")}
        sizes = {"kv_bytes": self.shape.kv_bytes, "nbytes": self.shape.nbytes, "flops": self.shape.flops}
        changes = asdict(self.shape)
        found["shape"] = {name: value for name, value in changes.items() if value is not None}
        return rounded({**found, **sizes})  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any], lines: list[Line]) -> "Timing":
        """The inverse of `to_json` and `lines`."""
        shape = {"extent": 1, **data["shape"]}  # older files do not say it: their blocks were in random order
        first = shape.get("first")
        own = {name: data[name] for name in ("num_layers", "rounds", "times", "eager", "errors")}
        return cls(
            shape=Shape(**{**shape, "first": first and tuple(first)}),
            ratios={peer: Spread(**x) for peer, x in data["ratios"].items()},
            samples={line.candidate: line.metrics[TIME] for line in lines if TIME in line.metrics},
            missing={line.candidate: line.note for line in lines if line.note},
            **own,
        )


def short(numbers: list[float]) -> list[float]:
    """With four digits."""
    return [float(f"{number:.4g}") for number in numbers]


def rounded(value: Any) -> Any:
    """The same, all floats in it with four digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return short([value])[0] if isinstance(value, float) else value
