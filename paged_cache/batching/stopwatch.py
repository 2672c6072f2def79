"""How long a forward takes, until its result is there."""

import time
from collections.abc import Callable, Sequence

import torch


class Stopwatch:
    """Runs from now on.

    A GPU computes behind Python's back: there it is its own clock that is asked, so that nobody waits before the result is needed.

    Args:
        clock: The batcher's, in seconds.
        devices: Those that compute.

    Attributes:
        begun: When, on the batcher's clock.
    """

    def __init__(self, clock: Callable[[], float], devices: Sequence[torch.device]) -> None:
        self._clock, self.begun = clock, clock()
        self._marks = [_mark(devices[0])] if [device.type for device in devices] == ["cuda"] else []
        self._start = time.perf_counter()

    def stop(self, result: torch.Tensor) -> None:
        """The forward was handed to the device; its time ends when `result` is there."""
        if self._marks:
            self._marks.append(_mark(result.device))
        elif result.is_cuda:  # several GPUs, which have no clock in common
            torch.cuda.current_stream(result.device).synchronize()
        self._seconds, self._ended = time.perf_counter() - self._start, self._clock()

    def read(self) -> tuple[float, float]:
        """Seconds that it took, and when it ended on the batcher's clock. Waits for the result."""
        if not self._marks:
            return self._seconds, self._ended
        start, end = self._marks
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        return seconds, self.begun + seconds


def _mark(device: torch.device) -> torch.cuda.Event:
    """A moment in what a GPU does, known when it comes to it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
