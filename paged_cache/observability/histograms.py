"""Histograms as Prometheus counts them, with vLLM's buckets. Plain Python."""

from bisect import bisect_left
from collections.abc import Sequence

FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    7680.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEQUENCES = (1, 2, 5, 10, 20)


def length_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `longest`."""
    steps = (digit * 10**power for power in range(len(str(longest))) for digit in (1, 2, 5))
    return tuple(step for step in steps if step <= longest)


class Histogram:
    """Counts of values by upper bound; one thread observes, any thread reads.

    Args:
        text: What the values are.
        bounds: Upper bounds of the buckets, rising; there is one more for what is above.

    Attributes:
        text: As given.
        sum: Of all values.
    """

    def __init__(self, text: str, bounds: Sequence[float]) -> None:
        self.text, self._bounds = text, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound as text, and how many values are not above it; the last one is `+Inf`, all of them."""
        total, found = 0, []
        for bound, count in zip([*map(float, self._bounds), "+Inf"], self._counts.copy(), strict=True):
            total += count
            found.append((str(bound), float(total)))
        return found
