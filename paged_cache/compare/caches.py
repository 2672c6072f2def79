"""One batch, generated with each cache: how long the first token and the others take, and what memory K and V need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache, StaticCache

from ..bench.measuring import Sample
from ..cache import PagedCache
from ..kv_memory import Memory, dense_memory, paged_memory
from ..patching import patch
from ..pool import BlockPool
from .settings import NUM_NEW_WITHOUT_CACHE
from .subject import Subject, Watch

Tokens = list[list[int]]


@dataclass
class Alone:
    """The reference: each prompt on its own, without padding, with a `DynamicCache`. Nothing is measured."""

    subject: Subject
    rows: Tokens
    num_new: Sequence[int]
    name: str = "reference"

    def run(self) -> Sample:
        """Answers that are computed once."""
        answers = [self.subject.answer(row, num) for row, num in zip(self.rows, self.num_new, strict=True)]
        return Sample(answers, {})


@dataclass
class NoCache:
    """`use_cache=False`: every step computes the whole text again. Generates a few tokens only."""

    subject: Subject
    rows: Tokens
    num_new: int
    name: str = "no KV cache"

    def run(self) -> Sample:
        """One `generate`, and the memory that is in use at its end."""
        cache = self._cache()
        watch = Watch(each=self._look)
        tokens = self._generate(cache, watch)
        return Sample(tokens, _times(watch.moments) | self._memory(cache))

    def _cache(self) -> Any:
        return None

    def _look(self) -> None:
        """After each step."""

    def _generate(self, cache: Any, watch: Watch) -> Tokens:
        num_new = min(self.num_new, NUM_NEW_WITHOUT_CACHE)
        return self.subject.generate(self.rows, num_new, cache, streamer=watch, use_cache=False)

    def _memory(self, cache: Any) -> dict[str, float]:
        return _bytes(Memory(self.name, 0, 0))


@dataclass
class Dynamic(NoCache):
    """What `generate` uses by itself: tensors that grow by a copy in every step, as wide as the longest row."""

    name: str = "DynamicCache"

    def _cache(self) -> Any:
        return DynamicCache(config=self.subject.model.config)

    def _generate(self, cache: Any, watch: Watch) -> Tokens:
        return self.subject.generate(self.rows, self.num_new, cache, streamer=watch)

    def _memory(self, cache: Any) -> dict[str, float]:
        width = max(map(len, self.rows))
        end = width + self.num_new - 1  # the last token is never stored
        spans = [(width - len(row), end) for row in self.rows]
        return _bytes(dense_memory(self.name, cache, spans, end))


@dataclass
class Static(Dynamic):
    """Allocated once, as long as the longest row and its answer, and used again each time; never compiled."""

    name: str = "StaticCache"
    _made: StaticCache | None = field(default=None, repr=False)

    def _cache(self) -> Any:
        if self._made is None:
            length = max(map(len, self.rows)) + self.num_new
            self._made = StaticCache(config=self.subject.model.config, max_cache_len=length)
        else:
            self._made.reset()
        return self._made

    def _generate(self, cache: Any, watch: Watch) -> Tokens:
        return self.subject.generate(self.rows, self.num_new, cache, streamer=watch, disable_compile=True)


@dataclass
class Paged(Dynamic):
    """Ours, on a pool that stays; its prefixes are forgotten between two runs. Reserved is the most it ever held."""

    name: str = "PagedCache"
    _pool: BlockPool | None = field(default=None, repr=False)
    _peak: int = field(default=0, repr=False)

    def run(self) -> Sample:
        """As all others; the model is patched, as a program does it once."""
        with patch(self.subject.model):
            return super().run()

    def _cache(self) -> Any:
        if self._pool is None:
            self._pool = self.subject.make_pool(self.rows, self.num_new)
        self._pool.clear_prefix_cache()
        self._peak = 0
        return PagedCache(self._pool)

    def _look(self) -> None:
        assert self._pool is not None
        self._peak = max(self._peak, self._pool.num_blocks - self._pool.num_free)

    def _memory(self, cache: Any) -> dict[str, float]:
        memory = paged_memory(self.name, cache, [len(row) + self.num_new - 1 for row in self.rows])
        reserved = max(memory.reserved, self._peak * cache.pool.nbytes // cache.pool.num_blocks)
        cache.release()
        return _bytes(Memory(self.name, reserved, memory.used))


OURS = (Paged.__name__,)
CACHES: tuple[type[NoCache], ...] = (NoCache, Dynamic, Static, Paged)


def _times(moments: list[float]) -> dict[str, float]:
    """Of a batch, whose rows get their tokens at the same time."""
    first, last = moments[0], moments[-1]
    return {"mean_ttft_ms": first * 1e3, "mean_tpot_ms": (last - first) / (len(moments) - 1) * 1e3}


def _bytes(memory: Memory) -> dict[str, float]:
    return {"reserved_bytes": memory.reserved, "used_bytes": memory.used, "wasted_bytes": memory.wasted}
