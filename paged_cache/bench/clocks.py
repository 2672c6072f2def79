"""Moments on the device that computes: where nothing waits for the CPU, its clock says nothing."""

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Of one device."""

    def mark(self) -> Any:
        """Now, in the order of what was launched."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks."""

    def wait(self) -> None:
        """Until all that was launched is done."""


class WallClock:
    """Of the CPU."""

    def mark(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Between two marks."""
        return end - start

    def wait(self) -> None:
        """Everything is done when its call returns."""


class CudaClock:
    """Of the current CUDA device and stream."""

    def mark(self) -> torch.cuda.Event:
        """An event, recorded."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Waits for the end."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        """Of all streams."""
        torch.cuda.synchronize()


def clock_of(device: str) -> Clock:
    """The right one."""
    return CudaClock() if device.startswith("cuda") else WallClock()
