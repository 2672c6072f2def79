"""This package's batcher."""

import time
from dataclasses import dataclass
from typing import Any

from paged_cache import BlockPool, ContinuousBatcher, RequestOutput
from paged_cache.bench.workload import Workload

from .outcome import Run, Served


@dataclass
class Ours:
    """`ContinuousBatcher.generate` with a pool and a prefix index of its own for each run.

    Attributes:
        policy: Of the batcher; also the candidate's name.
        room: Size of the pool, of what all requests would need at once.
        limits: `max_num_seqs`, `max_num_batched_tokens`.
    """

    model: Any
    policy: str
    room: float
    limits: dict[str, Any]
    block_size: int = 16

    @property
    def name(self) -> str:
        """In tables."""
        return self.policy

    def describe(self) -> dict[str, Any]:
        """Settings."""
        return {"room": self.room, "block_size": self.block_size, **self.limits}

    def run(self, workload: Workload) -> Run:
        """From the call of `generate` until it returns."""
        with self.batcher(workload) as batcher:
            start = time.monotonic()  # the batcher's clock
            outputs = self.serve(batcher, workload)
            seconds = time.monotonic() - start
            pool, stats = batcher.pool, batcher.stats()
        pool.check()
        kv_bytes = stats.peak_blocks_in_use * pool.nbytes // pool.num_blocks
        requests = [_served(output, start) for output in outputs]
        return Run(seconds, requests, kv_bytes, stats.num_preemptions, sum(x.cached_tokens for x in outputs))

    def batcher(self, workload: Workload) -> ContinuousBatcher:
        """A new one, on a new pool."""
        return ContinuousBatcher(self.model, self._pool(workload), policy=self.policy, **self.limits)

    def serve(self, batcher: ContinuousBatcher, workload: Workload) -> list[RequestOutput]:
        """All requests."""
        return batcher.generate(workload.prompts, max_new_tokens=workload.num_new, do_sample=False, progress_bar=False)

    def _pool(self, workload: Workload) -> BlockPool:
        """At least large enough for the longest request; its memory is there, as it is in a pool that was used before."""
        lengths = [len(prompt) + new for prompt, new in zip(workload.prompts, workload.num_new, strict=True)]
        blocks = [-(-length // self.block_size) for length in lengths]
        num_blocks = max(max(blocks) + 1, int(self.room * sum(blocks)))
        pool = BlockPool.for_model(self.model, num_blocks=num_blocks, block_size=self.block_size)
        pool.storage.fill_blocks(list(range(num_blocks)), 0.0)
        return pool


def _served(output: RequestOutput, start: float) -> Served:
    times = output.metrics
    if output.error is not None or times.ttft is None or times.e2e_latency is None:
        raise RuntimeError(f"{output.request_id} ended with {output.finish_reason}: {output.error}")
    arrival = times.arrival_time - start
    return Served(list(output.generated_tokens), arrival + times.ttft, arrival + times.e2e_latency)
