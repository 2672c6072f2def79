"""What people use without this package: a loop of `generate`, padded batches, transformers' own batching."""

import time
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ...kv_memory import key_value_tensors
from ..workload import Workload
from .outcome import Pace, Run, Served

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

    def serve(self, workload: Workload, pace: Pace | None = None) -> Run:
        """Batches in the order of arrival; each begins when all of its requests came, and ends with its longest answer."""
        pace = pace or Pace.at_once(len(workload.prompts))
        start, requests, kv_bytes = time.perf_counter(), list[Served](), 0
        for i in range(0, len(workload.prompts), self.size):
            rows, num_new = workload.prompts[i : i + self.size], workload.num_new[i : i + self.size]
            _sleep_until(start + max(pace.arrivals[i : i + self.size]))
            cache = DynamicCache(config=self.model.config)
            watch = Stopwatch()
            outputs = self._generate(rows, max(num_new), cache, watch)
            kv_bytes = max(kv_bytes, _nbytes(cache))
            times = [moment - start for moment in watch.times[1:]]
            for row, n in zip(outputs.tolist(), num_new, strict=True):
                requests.append(Served(row[:n], times[:n], _let_in(requests, pace)))
        return Run(time.perf_counter() - start, requests, kv_bytes, kv_bytes)

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

    On CUDA with its own settings. On a CPU its SDPA attends from every query to the keys of all requests of a batch,
    through a mask: a larger batch is not faster from some number of keys on, and requests are admitted up to about that
    number.

    Attributes:
        page_size, max_tokens: Of its `ContinuousBatchingConfig`, on a CPU.
        num_keys: About as many tokens do the requests have together that it may serve at a time, there.
    """

    model: Any
    name: str = "generate_batch"
    page_size: int = 256
    max_tokens: int = 256
    num_keys: int = 3000
    _hits: int = field(default=0, repr=False)
    _in_use: int = field(default=0, repr=False)

    def describe(self) -> dict[str, Any]:
        """Settings."""
        if not self._is_limited:
            return {"settings": "transformers' own"}
        return {"page_size": self.page_size, "max_tokens": self.max_tokens, "num_keys": self.num_keys}

    @property
    def _is_limited(self) -> bool:
        return bool(self.model.device.type == "cpu")

    def serve(self, workload: Workload, pace: Pace | None = None) -> Run:
        """From the moment its thread starts; without a pace with all requests in its queue."""
        count, arrivals = len(workload.prompts), dict[str, float]()
        manager = self._manager(workload)

        def add(arrival: float) -> None:
            i = len(arrivals)
            arrivals[str(i)] = arrival
            options = {"max_new_tokens": workload.num_new[i], "record_timestamps": True}
            manager.add_request(workload.prompts[i], request_id=str(i), **options)

        try:
            for _ in range(0 if pace else count):
                add(0.0)
            start = time.perf_counter()
            manager.start()
            outputs = _feed(manager, add, start, pace) if pace else [_next_result(manager) for _ in range(count)]
            seconds = time.perf_counter() - start
            allocated = manager.batch_processor.cache.cache_tensor.nbytes
        finally:
            manager.stop(block=True)
            manager.destroy()
        requests = [
            Served(x.generated_tokens, [moment - start for moment in x.timestamps], arrivals[x.request_id])
            for x in sorted(outputs, key=lambda x: int(x.request_id))
        ]
        return Run(seconds, requests, allocated, self._in_use, cached_tokens=self._hits)

    def _settings(self, workload: Workload) -> ContinuousBatchingConfig:
        """On a CPU, its cache is large enough for all requests that it may serve at a time."""
        if not self._is_limited:
            return ContinuousBatchingConfig()
        count = len(workload.prompts)
        mean = (workload.num_prompt_tokens + workload.num_new_tokens) / count
        max_requests = min(count, max(2, round(self.num_keys / mean)))
        pages = -(-workload.max_tokens // self.page_size)
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=pages * max_requests * 5 // 4 + 1,  # it keeps 15 % free
            max_batch_tokens=self.max_tokens,
            max_requests_per_batch=max_requests,
            auto_switch_to_flash=False,
        )

    def _manager(self, workload: Workload) -> Any:
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self.model.init_continuous_batching(greedy, self._settings(workload))
        manager.warmup()  # makes its cache
        self._count_hits(manager.batch_processor.cache)
        self._watch_pages(manager.batch_processor.cache)
        return manager

    def _count_hits(self, cache: Any) -> None:
        search, self._hits = cache.search_prefix_match, 0

        def counted(*args: Any) -> int:
            found = int(search(*args))
            self._hits += found
            return found

        cache.search_prefix_match = counted

    def _watch_pages(self, cache: Any) -> None:
        """Whenever a request gets pages: those of all requests, each once; pages that only the prefix search keeps are not."""
        store, self._in_use = cache.can_store_request_tokens, 0

        def watched(*args: Any, **options: Any) -> bool:
            is_stored = bool(store(*args, **options))
            self._in_use = max(self._in_use, sum(map(_held_bytes, cache.cache_allocators.values())))
            return is_stored

        cache.can_store_request_tokens = watched


def _feed(manager: Any, add: Any, start: float, pace: Pace) -> list[Any]:
    """Hands requests in as they come; all results."""
    count, limit = len(pace.arrivals), pace.max_concurrency or len(pace.arrivals)
    outputs: list[Any] = []
    num_added, free_since = 0, 0.0
    while len(outputs) < count:
        if num_added < count and num_added - len(outputs) < limit:
            wait = start + pace.arrivals[num_added] - time.perf_counter()
            if wait <= 0:
                add(max(pace.arrivals[num_added], free_since))
                num_added += 1
                continue
            result = manager.get_result(timeout=wait)
            outputs += [_checked(result)] if result else []
        else:
            outputs.append(_next_result(manager))
            free_since = time.perf_counter() - start if num_added - len(outputs) == limit - 1 else free_since
    return outputs


def _held_bytes(allocator: Any) -> int:
    """Of the blocks in tables of requests."""
    return len(set().union(*allocator.block_table.values())) * int(allocator.bytes_per_block)


def _next_result(manager: Any) -> Any:
    """The next request that ended."""
    result = manager.get_result(timeout=PATIENCE)
    if result is None:
        raise RuntimeError("transformers' batching failed: no result")
    return _checked(result)


def _checked(result: Any) -> Any:
    if result.error:
        raise RuntimeError(f"transformers' batching failed: {result.error}")
    return result


def _let_in(served: list[Served], pace: Pace) -> float:
    """When the next request came, or the one ended that it had to wait for."""
    i, limit = len(served), pace.max_concurrency
    ended = served[i - limit].times[-1] if limit and i >= limit else 0.0
    return max(pace.arrivals[i], ended)


def _sleep_until(moment: float) -> None:
    if (wait := moment - time.perf_counter()) > 0:
        time.sleep(wait)


def _nbytes(cache: DynamicCache) -> int:
    """K and V that a `DynamicCache` holds."""
    return sum(keys.nbytes + values.nbytes for keys, values in key_value_tensors(cache))
