"""This package's batcher."""

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ... import AsyncContinuousBatcher, BlockPool, ContinuousBatcher, RequestOutput
from ..workload import Workload
from .outcome import Pace, Run, Served

POLICIES = ("fcfs", "sjf", "hrrn")
PREPACKED = "prepacked"
"""The candidate that serves shortest jobs first, with weights that were prepacked before the first request came."""
OURS = (*POLICIES, PREPACKED)


@dataclass
class Ours:
    """The batcher with a pool and a prefix index of its own for each run.

    Attributes:
        name: In tables: of `OURS`.
        room: Size of the pool, of what all requests would need at once.
        limits: `max_num_seqs`, `max_num_batched_tokens`; those that are left out are the batcher's own.
    """

    model: Any
    name: str
    room: float = 1.0
    limits: dict[str, Any] = field(default_factory=dict)
    block_size: int = 16

    @property
    def options(self) -> dict[str, Any]:
        """Of the batcher."""
        is_prepacked = self.name == PREPACKED
        return {"policy": "sjf" if is_prepacked else self.name, "prepack_weights": is_prepacked, **self.limits}

    def describe(self) -> dict[str, Any]:
        """Settings."""
        return {"room": self.room, "block_size": self.block_size, **self.limits}

    def serve(self, workload: Workload, pace: Pace | None = None) -> Run:
        """By `ContinuousBatcher` where all requests are there, by `AsyncContinuousBatcher` where they come."""
        return self._serve_at_once(workload) if pace is None else asyncio.run(self._serve_over_time(workload, pace))

    def batcher(self, workload: Workload) -> ContinuousBatcher:
        """A new one, on a new pool."""
        return ContinuousBatcher(self.model, self._pool(workload), **self.options)

    def _serve_at_once(self, workload: Workload) -> Run:
        """From handing the requests in until the last one is over."""
        with self.batcher(workload) as batcher:
            start = time.perf_counter()
            handles = batcher.submit_all(workload.prompts, max_new_tokens=workload.num_new, do_sample=False)
            times: list[list[float]] = [[] for _ in handles]
            for handle, moments in zip(handles, times, strict=True):
                handle.add_listener(partial(_note, moments, start))
            outputs = [handle.result() for handle in handles]
            seconds = time.perf_counter() - start
            requests = [_served(output, moments[:-1]) for output, moments in zip(outputs, times, strict=True)]
            return _run(seconds, requests, outputs, batcher.pool, batcher.stats())

    async def _serve_over_time(self, workload: Workload, pace: Pace) -> Run:
        """Each request by a task of its own, which reads its tokens."""
        pool, limit = self._pool(workload), pace.max_concurrency
        gate = asyncio.Semaphore(limit or len(workload.prompts))

        async def serve(i: int) -> tuple[Served, RequestOutput]:
            await asyncio.sleep(start + pace.arrivals[i] - time.perf_counter())
            is_full = gate.locked()
            async with gate:
                arrival = time.perf_counter() - start if is_full else pace.arrivals[i]
                options = {"max_new_tokens": workload.num_new[i], "do_sample": False}
                handle = await batcher.submit(workload.prompts[i], **options)
                times = [time.perf_counter() - start async for _ in handle]
                output = await handle.result()
                return _served(output, times, arrival), output

        async with AsyncContinuousBatcher(self.model, pool, **self.options) as batcher:
            start = time.perf_counter()
            pairs = await asyncio.gather(*map(serve, range(len(workload.prompts))))
            seconds, stats = time.perf_counter() - start, batcher.stats()
        return _run(seconds, [request for request, _ in pairs], [output for _, output in pairs], pool, stats)

    def _pool(self, workload: Workload) -> BlockPool:
        """At least large enough for the longest request; its memory is there, as it is in a pool that was used before."""
        lengths = [len(prompt) + new for prompt, new in zip(workload.prompts, workload.num_new, strict=True)]
        blocks = [-(-length // self.block_size) for length in lengths]
        num_blocks = max(max(blocks) + 1, int(self.room * sum(blocks)))
        pool = BlockPool.for_model(self.model, num_blocks=num_blocks, block_size=self.block_size)
        pool.storage.fill_blocks(list(range(num_blocks)), 0.0)
        return pool


def _note(moments: list[float], start: float, token: int | None) -> None:
    moments.append(time.perf_counter() - start)


def _served(output: RequestOutput, times: list[float], arrival: float = 0.0) -> Served:
    if output.finish_reason != "length":
        raise RuntimeError(f"{output.request_id} ended with {output.finish_reason}: {output.error}")
    return Served(list(output.generated_tokens), times, arrival)


def _run(seconds: float, requests: list[Served], outputs: list[RequestOutput], pool: BlockPool, stats: Any) -> Run:
    pool.check()
    in_use = stats.peak_blocks_in_use * pool.nbytes // pool.num_blocks
    cached_tokens = sum(output.cached_tokens for output in outputs)
    return Run(seconds, requests, pool.nbytes, in_use, stats.num_preemptions, cached_tokens)
