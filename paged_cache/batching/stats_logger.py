"""The line on throughput, queue and pool that a batcher logs every few seconds."""

import logging
from collections import deque
from typing import Any

from ..compat import logger
from ..errors import InvalidRequestError
from ..wording import shown
from .events import Event, Idle, Scheduled, StepDone

INTERVAL = 5.0
RECENT_REQUESTS = 1000
LINE = (
    "%sAvg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
    "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%"
)


def log_interval(log_stats: Any) -> float | None:
    """Seconds between two lines, five for True; None for no lines.

    Raises:
        InvalidRequestError: `log_stats` is neither a switch nor a positive number.
    """
    if isinstance(log_stats, bool) or log_stats is None:
        return INTERVAL if log_stats else None
    if not isinstance(log_stats, int | float) or not log_stats > 0:
        raise InvalidRequestError(f"log_stats={shown(log_stats)}: True, False, or seconds above 0 are needed.")
    return float(log_stats)


class StatsLogger:
    """Logs how a batcher does, as vLLM words it, to logger "paged_cache": `batcher.observe(StatsLogger())`.

    A line comes behind the first step that ends `interval` seconds after the last line, at level INFO, and, where the
    batcher has a thread (`start`), also while there is nothing to do: at level DEBUG from the second idle interval on.
    Pauses between steps in which nobody was there to log do not count: throughput is that of the time before or after.

    Prompt tokens count when they are computed for the first time: not those that the pool had, nor those that are computed
    again after a preemption. Generated tokens count for every sequence. Running, waiting and the usage are those of the
    moment. The hit rate is the share of cached tokens in the prompts of the last 1000 requests that began.

    Args:
        interval: Seconds between two lines.
        name: Goes in front of each line, `name: ...`, where several batchers log.
    """

    def __init__(self, interval: float = INTERVAL, name: str | None = None) -> None:
        self._name = "" if name is None else f"{name}: "
        self._interval = log_interval(interval) or INTERVAL
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_REQUESTS)
        self._since: float | None = None
        self._last = 0.0
        self._num_prompt = self._num_generated = 0
        self._was_busy = False
        self._moment = (0, 0, 0.0)

    def __call__(self, event: Event) -> None:
        """Takes note of an event."""
        if isinstance(event, StepDone):
            self._rest(event.start)
            self._num_prompt += event.num_prompt_tokens
            self._num_generated += event.num_generated_tokens
            self._moment = event.num_running, event.num_waiting, event.blocks_in_use / event.num_blocks
            self._pass(event.time)
        elif isinstance(event, Idle):
            self._moment = 0, 0, event.blocks_in_use / event.num_blocks
            self._since = event.time if self._since is None else self._since
            self._pass(event.time)
        elif isinstance(event, Scheduled) and event.is_first:
            self._recent.append((event.num_tokens, event.num_cached_tokens))

    def _rest(self, start: float) -> None:
        """Nothing was heard from the last event until `start`; if that was long, what was before is logged."""
        if self._since is not None and start - self._last < self._interval:
            return
        if self._num_prompt or self._num_generated:
            self._log(self._last)
        self._since = start

    def _pass(self, now: float) -> None:
        self._last = now
        if self._since is not None and now - self._since >= self._interval:
            self._log(now)

    def _log(self, now: float) -> None:
        """Logs a line about the time since the last one."""
        seconds = max(now - self._since, 1e-9) if self._since is not None else self._interval
        is_busy = bool(self._num_prompt or self._num_generated)
        tokens, cached = (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0, 0)
        running, waiting, usage = self._moment
        logger.log(
            logging.INFO if is_busy or self._was_busy else logging.DEBUG,
            LINE,
            self._name,
            self._num_prompt / seconds,
            self._num_generated / seconds,
            running,
            waiting,
            100 * usage,
            100 * cached / max(tokens, 1),
        )
        self._since, self._was_busy = now, is_busy
        self._num_prompt = self._num_generated = 0
