"""The progress bar of `generate`."""

import time
from collections.abc import Callable
from types import TracebackType

from tqdm.auto import tqdm

from .handle import RequestHandle
from .stats import BatcherStats

REFRESH_SECONDS = 0.2


class Progress:
    """A bar over requests, with what runs and waits, tokens per second, and how full the pool is.

    Args:
        total: Requests.
        is_shown: False for no bar; a bar is shown on terminals only.
        stats: Says how things stand.
    """

    def __init__(self, total: int, is_shown: bool, stats: Callable[[], BatcherStats]) -> None:
        self._bar = tqdm(total=total, unit="request", disable=None if is_shown and total else True)
        self._stats, self._started, self._refreshed = stats, time.monotonic(), 0.0
        self._first = 0  # the first request that may not be over
        self._tokens = 0 if self._bar.disable else stats().num_generated_tokens

    def count(self, handles: list[RequestHandle]) -> int:
        """How many of the requests are over; shows it now and then."""
        while self._first < len(handles) and handles[self._first].done:
            self._first += 1
        now = time.monotonic()
        if not self._bar.disable and now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            self._show(sum(handle.done for handle in handles), now)
        return self._first

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._bar.disable and kind is None:
            self._show(self._bar.total, time.monotonic())
        self._bar.close()

    def _show(self, count: int, now: float) -> None:
        stats = self._stats()
        speed = (stats.num_generated_tokens - self._tokens) / max(now - self._started, 1e-9)
        self._bar.n = count
        self._bar.set_postfix_str(
            f"running {stats.num_running}, waiting {stats.num_waiting}, {speed:.0f} tokens/s, "
            f"KV {stats.blocks_in_use / stats.num_blocks:.0%}"
        )
