"""Where the candidates run: how their time is taken, and what the machine can do at best."""

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from .candidates import Candidate, Output

Stopwatch = Callable[[], float]
"""Runs a candidate and returns the seconds of one call."""

GIB = 2**30
LONG = 0.02  # seconds
MAX_LAYERS = 64  # that are used in turn


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in the simplest of programs.

    Attributes:
        read: GB/s of a reduction of a tensor that is much larger than the caches.
        cached: The same for a tensor in the cache: how fast the reduction could go.
        copy: GB/s of a copy, read and written bytes together.
        gflops: Of a matrix product, by the name of the dtype.
    """

    read: float
    cached: float
    copy: float
    gflops: dict[str, float]

    @property
    def doubt(self) -> str:
        """Why `read` may be too low: a reduction that is not much faster in the cache does not show what memory can do."""
        return "" if self.cached > 1.3 * self.read else "the reduction may be the limit, not the memory"


class Machine(Protocol):
    """One kind of device."""

    device: str
    cache_bytes: int  # of the last level
    is_cold: bool  # whether each call shall find its keys and values in memory, not in the cache

    def describe(self) -> dict[str, Any]:
        """Name and the like, for the results."""

    def free_bytes(self) -> int:
        """Memory for tensors."""

    def stopwatch(self, candidate: Candidate, num_layers: int) -> tuple[Stopwatch, Output, int]:
        """A stopwatch for the candidate, an output of what it times, and the layer that the output belongs to."""

    def eager(self, candidate: Candidate, num_layers: int) -> float | None:
        """Seconds per call without a graph, if the stopwatch uses one."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run, the fastest of several."""

    def ceilings(self, scale: int) -> Ceilings:
        """Measured with tensors `scale` times smaller than is right."""


class Cpu:
    """`threads` threads of torch."""

    device = "cpu"

    def __init__(self, threads: int, is_cold: bool) -> None:
        torch.set_num_threads(threads)
        self.threads, self.is_cold, self.cache_bytes = threads, is_cold, _last_level_cache()

    def describe(self) -> dict[str, Any]:
        """Cores; the rest is said of every benchmark."""
        return {"cores": os.cpu_count()}

    def free_bytes(self) -> int:
        """Without swapping."""
        return int(0.8 * psutil.virtual_memory().available)

    def stopwatch(self, candidate: Candidate, num_layers: int) -> tuple[Stopwatch, Output, int]:
        """Unless the caches are to be cold, an untimed call goes first: what fits is found where that one left it.

        Calls that take long do without, as what they read does not fit, or does not matter.
        """
        layers, last = itertools.cycle(range(num_layers)), 0.0

        def sample() -> float:
            nonlocal last
            layer = next(layers)
            if not self.is_cold and last < LONG:
                candidate(layer)
            start = time.perf_counter()
            candidate(layer)
            last = time.perf_counter() - start
            return last

        return sample, candidate(0), 0

    def eager(self, candidate: Candidate, num_layers: int) -> float | None:
        """There is nothing else."""
        return None

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall clock, fastest of 7 after one that is not counted."""
        times = []
        for _ in range(8):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def ceilings(self, scale: int) -> Ceilings:
        """Half a GiB, and half of the second-level caches; products of 2048 x 2048."""
        return _ceilings(self, 2**29 // scale, 2**19 * self.threads, 2048 // scale, ("float32", "bfloat16"))


class Cuda:
    """The current CUDA device. Times are those of replayed graphs, in which nothing waits for Python."""

    device, is_cold = "cuda", True
    fewest_calls = 20  # in a graph

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = self.properties.L2_cache_size

    def describe(self) -> dict[str, Any]:
        """Name, size, driver side of things."""
        x = self.properties
        size = {"multiprocessors": x.multi_processor_count, "l2_bytes": x.L2_cache_size, "bytes": x.total_memory}
        return {"device": x.name, "capability": f"{x.major}.{x.minor}", "cuda": torch.version.cuda, **size}

    def free_bytes(self) -> int:
        """After what earlier shapes used was given back."""
        gc.collect()
        torch.cuda.empty_cache()
        return int(0.92 * torch.cuda.mem_get_info()[0])

    def stopwatch(self, candidate: Candidate, num_layers: int) -> tuple[Stopwatch, Output, int]:
        """A graph of a forward of 20 layers or more. The output is poisoned, then written by a replay."""
        calls = max(self.fewest_calls, num_layers)

        def forward() -> Output:
            for layer in range(calls - 1):
                candidate(layer)
            return candidate(calls - 1)

        replay, output = self._capture(forward)
        for part in output if isinstance(output, list) else [output]:
            part.fill_(float("nan"))
        replay()
        self._synchronize()
        return lambda: self._events(replay) / calls, output, calls - 1

    def eager(self, candidate: Candidate, num_layers: int) -> float | None:
        """Wall clock of a forward, Python included."""
        self._synchronize()
        start = time.perf_counter()
        for layer in range(self.fewest_calls):
            candidate(layer)
        self._synchronize()
        return (time.perf_counter() - start) / self.fewest_calls

    def seconds(self, run: Callable[[], object]) -> float:
        """Between events, fastest of 7 after three that are not counted."""
        return min([self._events(run) for _ in range(10)][3:])

    def ceilings(self, scale: int) -> Ceilings:
        """8 GB copied or read, and a quarter of the L2 cache; products of 8192 x 8192."""
        return _ceilings(self, 8 * GIB // scale, self.cache_bytes // 4, 8192 // scale, ("bfloat16",))

    def _capture(self, forward: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        """Replays `forward`, and the output that each replay writes."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and allocates what must not happen in a capture
            forward()
        torch.cuda.current_stream().wait_stream(side)
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward()
        return graph.replay, output

    def _synchronize(self) -> None:
        torch.cuda.synchronize()

    def _events(self, run: Callable[[], object]) -> float:
        """Seconds on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Rehearsal(Cuda):
    """The same protocol on the CPU, with a function in the place of the graph: shows mistakes, its times mean nothing."""

    device = "cpu"
    fewest_calls = 3

    def __init__(self) -> None:
        self.cache_bytes = 2**14

    def describe(self) -> dict[str, Any]:
        """No device."""
        return {"device": "none, this is a rehearsal"}

    def free_bytes(self) -> int:
        """Enough."""
        return GIB

    def _capture(self, forward: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        output = forward()

        def replay() -> None:
            new, old = ([x] if isinstance(x, torch.Tensor) else x for x in (forward(), output))
            for source, destination in zip(new, old, strict=True):
                destination.copy_(source)

        return replay, output

    def _synchronize(self) -> None:
        """Nothing runs on."""

    def _events(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN instead of whatever was there before: what a kernel forgets to write shows."""
    switch: Any = torch.utils.deterministic  # a module that is replaced by an object when it is imported
    before = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        switch.fill_uninitialized_memory = before


def _ceilings(machine: Machine, nbytes: int, cached: int, size: int, dtypes: tuple[str, ...]) -> Ceilings:
    (read, copy), (cached_read, _) = (_rates(machine, n) for n in (nbytes, cached))
    gflops = {}
    for name in dtypes:
        a, b = torch.randn(2, size, size, device=machine.device).to(getattr(torch, name))
        gflops[name] = 2 * size**3 / machine.seconds(lambda a=a, b=b: a @ b) / 1e9  # type: ignore[misc]
    return Ceilings(read, cached_read, copy, gflops)


def _rates(machine: Machine, nbytes: int) -> tuple[float, float]:
    """GB/s of the fastest of some reductions that do little but read, and of a copy."""
    x, y = torch.ones(2, nbytes // 4, device=machine.device)
    readers = [x.sum, x.view(torch.int32).amax, x.view(torch.int64).sum]
    read = max(nbytes / machine.seconds(run) for run in readers)
    return read / 1e9, 2 * nbytes / machine.seconds(lambda: y.copy_(x)) / 1e9


def _last_level_cache() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)
