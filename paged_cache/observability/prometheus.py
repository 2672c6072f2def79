"""`PrometheusMetrics`: a batcher or a pool under vLLM's metric names."""

import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from ..adapters import BASE
from ..batching.asynchronous import AsyncContinuousBatcher
from ..batching.batcher import ContinuousBatcher
from ..batching.events import Event, Finished, Preempted, Queued, Scheduled, StepDone
from ..batching.output import FINISH_REASONS
from ..errors import InvalidRequestError
from ..optional import require
from ..pool import BlockPool
from ..wording import shown
from .families import Families
from .request_histograms import RequestHistograms

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

OWN_PREFIX = "paged_cache:"
"""Of metrics that vLLM does not have."""


class PrometheusMetrics:
    """Shows a batcher, or a pool alone, to Prometheus: `PrometheusMetrics(batcher)`.

    Names, types, labels and buckets are vLLM's, so that dashboards for vLLM work. What the batcher counts anyway (requests,
    tokens generated, preemptions, the pool) is read when Prometheus asks and counts from the batcher's beginning; histograms
    and prompt tokens are filled by an observer and count from now on. Metrics go with the batcher's end, or by `close`.

    Args:
        batcher: To show; None for a pool that is used without one.
        pool: To show where there is no batcher.
        registry: Where to register; prometheus_client's default if None.
        model_name: Label of that name; the model's own by default.
        engine: Label of that name, which tells several batchers in one registry apart.
        prefix: Of the names that are vLLM's; it tells nobody apart, as there are names without it.

    Raises:
        InvalidRequestError: Neither or both of batcher and pool, or the registry has these labels already.
        ModuleNotFoundError: prometheus_client is not installed; the message says what to install.
    """

    def __init__(
        self,
        batcher: ContinuousBatcher | AsyncContinuousBatcher | None = None,
        *,
        pool: BlockPool | None = None,
        registry: "CollectorRegistry | None" = None,
        model_name: str | None = None,
        engine: str = "0",
        prefix: str = "vllm:",
    ) -> None:
        inner, shown = _shown(batcher, pool)
        model = shown.weights.model if shown.weights is not None else None
        config = getattr(model, "config", None)
        own_name = getattr(config, "name_or_path", "") or type(model).__name__ if model is not None else ""
        self.labels = {"model_name": own_name if model_name is None else model_name, "engine": str(engine)}
        self._prefix, self._pool = prefix, weakref.ref(shown)
        self._batcher = None if inner is None else weakref.ref(inner)
        self._histograms = RequestHistograms(_longest(config, shown))
        self._num_prompt = self._num_cached = 0
        self._adapters: dict[str, tuple[str, bool]] = {}
        self._registration = Registration.of(registry)
        self._registration.add(self)
        if inner is not None:
            inner.observe(self)

    @property
    def names(self) -> tuple[str, ...]:
        """What tells it apart from others in one registry."""
        return tuple(self.labels.values())

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to show any more."""
        if self._batcher is None:
            return self._pool() is None
        batcher = self._batcher()
        return batcher is None or batcher._loop.is_over

    def close(self) -> None:
        """Takes the metrics out of the registry and observes no more."""
        self._registration.remove(self)
        batcher = None if self._batcher is None else self._batcher()
        if batcher is not None:
            batcher.stop_observing(self)

    def __call__(self, event: Event) -> None:
        """Counts what the batcher does not."""
        self._histograms(event)
        match event:
            case StepDone():
                self._num_prompt += event.num_prompt_tokens + event.num_cached_tokens
                self._num_cached += event.num_cached_tokens
            case Queued() if event.adapter_name not in (None, BASE):
                self._adapters[event.request_id] = event.adapter_name, False
            case Scheduled() | Preempted() if event.request_id in self._adapters:
                name, _ = self._adapters[event.request_id]
                self._adapters[event.request_id] = name, isinstance(event, Scheduled)
            case Finished():
                self._adapters.pop(event.request_id, None)

    def fill(self, families: Families) -> None:
        """Adds the values of this moment."""
        pool, batcher = self._pool(), None if self._batcher is None else self._batcher()
        if pool is None:
            return
        self._fill_pool(families, pool)
        if batcher is not None:
            self._fill_batcher(families, batcher)
            for name, histogram in self._histograms.by_name.items():
                families.histogram(self._prefix + name, histogram, self.labels)

    def _fill_pool(self, families: Families, pool: BlockPool) -> None:
        stats, name = pool.stats(), self._prefix
        families.gauge(name + "kv_cache_usage_perc", _USAGE, stats.num_referenced / stats.num_blocks, self.labels)
        families.counter(name + "prefix_cache_queries", _QUERIES, stats.prefix_queries, self.labels)
        families.counter(name + "prefix_cache_hits", _HITS, stats.prefix_hits, self.labels)
        about = {
            **self.labels,
            "block_size": pool.block_size,
            "num_gpu_blocks": pool.num_blocks,
            "cache_dtype": str(pool.kv_dtype).removeprefix("torch."),
            "enable_prefix_caching": pool.manager.prefix_caching,
        }
        families.gauge(name + "cache_config_info", "The pool: see the labels.", 1, about)
        states = {"free": stats.num_free - stats.num_cached, "cached": stats.num_cached, "in_use": stats.num_referenced}
        for state, count in states.items():
            families.gauge(
                OWN_PREFIX + "blocks", "Blocks of the pool by state.", count, {**self.labels, "state": state}
            )
        for own, value in {"evictions": stats.evictions, "cow_copies": stats.cow_copies}.items():
            families.counter(OWN_PREFIX + "block_" + own, _OWN[own], value, self.labels)
        for own, value in {"offloaded": stats.offloaded, "restored": stats.restored}.items():
            families.counter(OWN_PREFIX + "blocks_" + own, _OWN[own], value, self.labels)

    def _fill_batcher(self, families: Families, batcher: ContinuousBatcher) -> None:
        stats, name = batcher.stats(), self._prefix
        families.gauge(name + "num_requests_running", "Requests that run.", stats.num_running, self.labels)
        families.gauge(name + "num_requests_waiting", "Requests that wait.", stats.num_waiting, self.labels)
        families.counter(name + "num_preemptions", _PREEMPTIONS, stats.num_preemptions, self.labels)
        families.counter(name + "prompt_tokens", _PROMPT, self._num_prompt, self.labels)
        families.counter(name + "prompt_tokens_cached", _CACHED, self._num_cached, self.labels)
        families.counter(name + "generation_tokens", _GENERATED, stats.num_generated_tokens, self.labels)
        for reason in FINISH_REASONS:
            labels = {**self.labels, "finished_reason": reason}
            families.counter(name + "request_success", _ENDED, stats.finished.get(reason, 0), labels)
        families.counter(OWN_PREFIX + "steps", "Steps.", stats.num_steps, self.labels)
        families.counter(OWN_PREFIX + "step_seconds", "Seconds in steps.", stats.step_seconds, self.labels)
        families.counter(OWN_PREFIX + "forward_seconds", "Seconds in the model.", stats.forward_seconds, self.labels)
        adapters = list(self._adapters.values())
        if adapters or stats.loaded_adapters or batcher.max_loras is not None:
            about = {
                **self.labels,
                "max_lora": batcher.max_loras or "",
                "waiting_lora_adapters": ",".join(sorted({name for name, is_running in adapters if not is_running})),
                "running_lora_adapters": ",".join(sorted({name for name, is_running in adapters if is_running})),
            }
            families.gauge(name + "lora_requests_info", _LORA, time.time(), about)


class Registration:
    """All `PrometheusMetrics` of one registry: families of one name are collected together."""

    _all: ClassVar["weakref.WeakKeyDictionary[CollectorRegistry, Registration]"] = weakref.WeakKeyDictionary()
    _lock: ClassVar = threading.Lock()

    def __init__(self) -> None:
        self._shown: dict[tuple[str, ...], PrometheusMetrics] = {}

    @classmethod
    def of(cls, registry: "CollectorRegistry | None") -> "Registration":
        """That of a registry, registered there."""
        require("prometheus_client")
        from prometheus_client import REGISTRY

        registry = REGISTRY if registry is None else registry
        with cls._lock:
            if registry not in cls._all:
                cls._all[registry] = cls()
                registry.register(cls._all[registry])
            return cls._all[registry]

    def add(self, metrics: PrometheusMetrics) -> None:
        """Collects from `metrics`, too.

        Raises:
            InvalidRequestError: Others that are not over have the same labels.
        """
        with self._lock:
            known = self._shown.get(metrics.names)
            if known is not None and not known.is_over:
                raise InvalidRequestError(
                    f"model_name={metrics.labels['model_name']!r}, engine={metrics.labels['engine']!r} is in the registry "
                    "already: give another engine=, or close the PrometheusMetrics that has it."
                )
            self._shown[metrics.names] = metrics

    def remove(self, metrics: PrometheusMetrics) -> None:
        """Collects from `metrics` no more."""
        with self._lock:
            if self._shown.get(metrics.names) is metrics:
                del self._shown[metrics.names]

    def describe(self) -> list["Metric"]:
        """Nothing is promised: registering shall not collect."""
        return []

    def collect(self) -> Iterator["Metric"]:
        """Values of this moment."""
        families = Families()
        with self._lock:
            self._shown = {names: metrics for names, metrics in self._shown.items() if not metrics.is_over}
            shown = list(self._shown.values())
        for metrics in shown:
            metrics.fill(families)
        yield from families


def _shown(batcher: Any, pool: Any) -> tuple[ContinuousBatcher | None, BlockPool]:
    """The batcher, if there is one, and its pool."""
    if (batcher is None) == (pool is None):
        raise InvalidRequestError("a batcher or a pool is needed, one of them: a batcher shows its pool as well.")
    inner = batcher.batcher if isinstance(batcher, AsyncContinuousBatcher) else batcher
    if isinstance(inner, ContinuousBatcher):
        return inner, inner.pool
    if not isinstance(pool, BlockPool):
        raise InvalidRequestError(f"{shown(inner or pool)}: a batcher, or pool=BlockPool, is needed.")
    return None, pool


def _longest(config: Any, pool: BlockPool) -> int:
    """Most tokens of a sequence."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or pool.num_tokens


_USAGE = "Share of the pool's blocks that are in use, 0 to 1; cached blocks are not."
_QUERIES = "Prompt tokens that were looked up in the pool."
_HITS = "Prompt tokens that the pool had."
_PREEMPTIONS = "Times that a request lost its blocks to others."
_PROMPT = "Prompt tokens processed: computed, or found in the pool; computed again does not count."
_CACHED = "Those of the processed prompt tokens that were found in the pool."
_GENERATED = "Tokens generated, of all sequences."
_ENDED = "Requests that are over, by finish reason."
_LORA = "Adapters that running and waiting requests name; the value is the time."
_OWN = {
    "evictions": "Cached blocks that were taken for something else.",
    "cow_copies": "Shared blocks that were copied before a write.",
    "offloaded": "Blocks copied to host memory when they were evicted.",
    "restored": "Blocks copied back from host memory.",
}
