"""What people use without this package: a loop of `generate`, padded batches, transformers' own batching."""

import time
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from paged_cache.bench.workload import Workload

from .outcome import Run, Served

GENERATE_BATCH = ("generate_batch",) if "page_size" in signature(ContinuousBatchingConfig).parameters else ()
"""Earlier versions of transformers (5.17) have other settings, and are not measured."""

PATIENCE = 600.0  # seconds without any request of transformers' batching coming to its end


class Stopwatch(BaseStreamer):
    """Notes when `generate` chose the tokens of each step; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """One step."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass
class Loop:
    """`model.generate` for one request after the other."""

    model: Any
    name: str = "loop"
    size: int = 1

    def describe(self) -> dict[str, Any]:
        """Settings."""
        return {"batch_size": self.size}

    def run(self, workload: Workload) -> Run:
        """Batches in the order of arrival; each goes on until its longest answer is complete."""
        start, requests, kv_bytes = time.perf_counter(), list[Served](), 0
        for i in range(0, len(workload.prompts), self.size):
            rows, num_new = workload.prompts[i : i + self.size], workload.num_new[i : i + self.size]
            cache = DynamicCache(config=self.model.config)
            watch = Stopwatch()
            outputs = self._generate(rows, max(num_new), cache, watch)
            kv_bytes = max(kv_bytes, _nbytes(cache))
            times = [moment - start for moment in watch.times[1:]]
            requests += [
                Served(row[:n], times[0], times[n - 1]) for row, n in zip(outputs.tolist(), num_new, strict=True)
            ]
        return Run(time.perf_counter() - start, requests, kv_bytes)

    def _generate(self, rows: list[list[int]], num_new: int, cache: DynamicCache, watch: Stopwatch) -> torch.Tensor:
        """The new tokens of a batch, padded on the left."""
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        outputs = self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            streamer=watch,
            max_new_tokens=num_new,
            do_sample=False,
        )
        return torch.as_tensor(outputs[:, length:])


@dataclass
class Padded(Loop):
    """`model.generate` for batches in order of arrival; a request is usable with its own last token."""

    name: str = "padded"
    size: int = 8


@dataclass
class GenerateBatch:
    """transformers' continuous batching: what `generate_batch` does, with a length for each request.

    Its SDPA attends from every query to the keys of all requests of a batch, through a mask. So a larger batch is not
    faster from some number of keys on, and requests are admitted up to about that number.

    Attributes:
        page_size, max_tokens: Of its `ContinuousBatchingConfig`.
        num_keys: About as many tokens do the requests have together that it may serve at a time.
    """

    model: Any
    name: str = "generate_batch"
    page_size: int = 256
    max_tokens: int = 256
    num_keys: int = 3000
    _hits: int = field(default=0, repr=False)

    def describe(self) -> dict[str, Any]:
        """Settings."""
        return {"page_size": self.page_size, "max_tokens": self.max_tokens, "num_keys": self.num_keys}

    def run(self, workload: Workload) -> Run:
        """From the moment its thread starts, with all requests in its queue."""
        manager = self._manager(workload)
        try:
            for i, (prompt, num_new) in enumerate(zip(workload.prompts, workload.num_new, strict=True)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=num_new, record_timestamps=True)
            start = time.perf_counter()
            manager.start()
            outputs = [_next_result(manager) for _ in workload.prompts]
            seconds = time.perf_counter() - start
            kv_bytes = manager.batch_processor.cache.cache_tensor.nbytes
        finally:
            manager.stop(block=True)
            manager.destroy()
        requests = [
            Served(x.generated_tokens, x.timestamps[0] - start, x.timestamps[-1] - start)
            for x in sorted(outputs, key=lambda x: int(x.request_id))
        ]
        return Run(seconds, requests, kv_bytes, prefix_hits=self._hits)

    def _manager(self, workload: Workload) -> Any:
        """One whose cache is large enough for all requests that it may serve at a time."""
        count = len(workload.prompts)
        mean = (workload.num_prompt_tokens + workload.num_new_tokens) / count
        max_requests = min(count, max(2, round(self.num_keys / mean)))
        pages = -(-workload.max_tokens // self.page_size)
        batching = ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=pages * max_requests * 5 // 4 + 1,  # it keeps 15 % free
            max_batch_tokens=self.max_tokens,
            max_requests_per_batch=max_requests,
            auto_switch_to_flash=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self.model.init_continuous_batching(greedy, batching)
        manager.warmup()  # makes its cache
        self._count_hits(manager.batch_processor.cache)
        return manager

    def _count_hits(self, cache: Any) -> None:
        search, self._hits = cache.search_prefix_match, 0

        def counted(*args: Any) -> int:
            found = int(search(*args))
            self._hits += found
            return found

        cache.search_prefix_match = counted


def _next_result(manager: Any) -> Any:
    """The next request that ended."""
    result = manager.get_result(timeout=PATIENCE)
    if result is None or result.error:
        raise RuntimeError(f"transformers' batching failed: {result.error if result else 'no result'}")
    return result


def _nbytes(cache: Any) -> int:
    """K and V that a `DynamicCache` holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
