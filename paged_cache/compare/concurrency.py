"""Many requests of different lengths at once: everything that serves them, and how long they wait."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache

from ..bench.measuring import Sample
from ..bench.serving.metrics import throughput_metrics
from ..bench.serving.ours import Ours
from ..bench.serving.outcome import Run, Served
from ..bench.serving.peers import GENERATE_BATCH, GenerateBatch, Loop
from ..bench.workload import Workload
from ..kv_memory import key_value_tensors
from .settings import Settings
from .subject import BLOCK_SIZE, Subject, Watch

OURS = ("ContinuousBatcher",)
ONE_BY_ONE, IN_THREADS, PADDED = "one by one", "generate in threads", "one padded batch"


@dataclass
class Serving:
    """A candidate: somebody who serves a workload."""

    name: str
    server: Any
    workload: Workload

    def run(self) -> Sample:
        """All requests, once."""
        run: Run = self.server.serve(self.workload)
        return Sample(run.tokens, throughput_metrics(run, self.workload))


@dataclass
class Live:
    """Bytes of K and V of requests that are under way, each known by a number, and the most of all together.

    Attributes:
        peak: So far.
    """

    peak: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def update(self, number: int, nbytes: int) -> None:
        """What a request holds now; 0 at its end."""
        with self._lock:
            self._sizes[number] = nbytes
            self.peak = max(self.peak, sum(self._sizes.values()))


@dataclass
class Threads:
    """A thread per request, each of which calls `generate` with a cache of its own."""

    subject: Subject

    def serve(self, workload: Workload) -> Run:
        """All threads start at once."""
        start, live = time.perf_counter(), Live()
        requests = zip(workload.prompts, workload.num_new, strict=True)
        with ThreadPoolExecutor(len(workload.prompts)) as threads:
            calls = [
                threads.submit(self._call, i, prompt, num_new, start, live)
                for i, (prompt, num_new) in enumerate(requests)
            ]
            answers = [call.result() for call in calls]
        return Run(time.perf_counter() - start, answers, live.peak, live.peak)

    def _call(self, number: int, prompt: list[int], num_new: int, start: float, live: Live) -> Served:
        cache = DynamicCache(config=self.subject.model.config)
        watch = Watch(start, each=lambda: live.update(number, _nbytes(cache)))
        try:
            (tokens,) = self.subject.generate([prompt], num_new, cache, streamer=watch)
        finally:
            live.update(number, 0)
        return Served(tokens, watch.moments)


@dataclass
class PaddedBatch:
    """One `generate` for all: every row is as wide as the longest, and goes on until the longest answer is complete."""

    subject: Subject

    def serve(self, workload: Workload) -> Run:
        """A request is over with its own last token."""
        start = time.perf_counter()
        cache, watch = DynamicCache(config=self.subject.model.config), Watch(start)
        rows = self.subject.generate(workload.prompts, max(workload.num_new), cache, streamer=watch)
        requests = [Served(row[:n], watch.moments[:n]) for row, n in zip(rows, workload.num_new, strict=True)]
        return Run(time.perf_counter() - start, requests, _nbytes(cache), _nbytes(cache))


def make_workload(subject: Subject, count: int) -> Workload:
    """The first prompts, and how many new tokens each of them gets: from an eighth of the most on, all equally likely."""
    most = subject.settings.max_new_tokens
    lengths = random.Random(subject.settings.seed)
    num_new = [lengths.randint(max(2, most // 8), most) for _ in range(subject.settings.num_requests)]
    return Workload(subject.prompts[:count], num_new[:count])


def servings(subject: Subject, workload: Workload) -> list[Serving]:
    """Everybody who can serve it with the installed libraries."""
    model: Any = subject.model
    ways: dict[str, Any] = {ONE_BY_ONE: Loop(model), IN_THREADS: Threads(subject), PADDED: PaddedBatch(subject)}
    if GENERATE_BATCH:
        ways["generate_batch"] = GenerateBatch(model)
    ways["ContinuousBatcher"] = Ours(model, "sjf", 1.25, {}, BLOCK_SIZE)
    return [Serving(name, way, workload) for name, way in ways.items()]


def left_out(settings: Settings) -> dict[str, str]:
    """Who is not there, and why."""
    if GENERATE_BATCH or not settings.concurrency:
        return {}
    return {"generate_batch": "the installed transformers is older than its settings that are measured"}


def _nbytes(cache: DynamicCache) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in key_value_tensors(cache))
