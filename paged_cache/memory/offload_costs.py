"""Whether copying blocks to host memory and back is cheaper than computing their tokens again. Plain Python."""

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

RETRY_SECONDS = 10.0
"""So long a measured copy is believed: where copying seemed dearer than computing, it is tried again after that."""

REMEMBERED, ENOUGH = 15, 5
"""Measurements that count, and how many there must be to be believed. Single ones are wrong by factors: the first forward
compiles, the first copy to each huge page of host memory waits until the system has cleared it."""


class Stopwatch:
    """Measures seconds: `stop(start(), tell)` calls `tell` with them, at once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def start(self) -> Any:
        """A mark for `stop`."""
        return self._clock()

    def stop(self, mark: Any, tell: Callable[[float], None]) -> None:
        """Tells the seconds since `mark`."""
        tell(self._clock() - mark)


class Rate:
    """Seconds per unit: the median of the last measurements."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=REMEMBERED)

    def observe(self, seconds: float, num_units: int) -> None:
        """Takes in a measurement of so many units."""
        self._rates.append(seconds / num_units)

    @property
    def value(self) -> float | None:
        """Seconds per unit; None until there are enough measurements."""
        return median(self._rates) if len(self._rates) >= ENOUGH else None


class OffloadCosts:
    """Compares copies with computation, both as measured. What was not measured yet is done: that is how it is measured.

    Args:
        tokens_per_block: Tokens whose K and V, in all layers, take the space of one block; below the block size where
            there are several layer groups.
        clock: Seconds.
    """

    def __init__(self, tokens_per_block: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens_per_block, self._clock = tokens_per_block, clock
        self._copies, self._forwards = Rate(), Rate()
        self._copied_at = -RETRY_SECONDS

    @property
    def seconds_per_block(self) -> float | None:
        """Of a copy in either direction; None if there is no recent one."""
        return None if self._is_stale() else self._copies.value

    @property
    def seconds_per_token(self) -> float | None:
        """Of computing a prompt."""
        return self._forwards.value

    def observe_copy(self, num_blocks: int, seconds: float) -> None:
        """Takes in a copy, in either direction."""
        if self._is_stale():
            self._copies = Rate()
        self._copies.observe(seconds, num_blocks)
        self._copied_at = self._clock()

    def observe_forward(self, num_tokens: int, seconds: float) -> None:
        """Takes in a forward over many new tokens."""
        self._forwards.observe(seconds, num_tokens)

    def pays_saving(self) -> bool:
        """Whether copying a block out and back later takes less time than computing its tokens again."""
        return self._is_cheaper(2, self._tokens_per_block)

    def pays_restoring(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether copying so many blocks back takes less time than computing so many tokens."""
        return self._is_cheaper(num_blocks, num_tokens)

    def _is_cheaper(self, num_copies: int, num_tokens: float) -> bool:
        per_block, per_token = self.seconds_per_block, self.seconds_per_token
        return per_block is None or per_token is None or num_copies * per_block < num_tokens * per_token

    def _is_stale(self) -> bool:
        return self._clock() - self._copied_at >= RETRY_SECONDS
