"""States of blocks: which are free, referenced or cached. Plain Python."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from ..errors import InvalidRequestError, OutOfBlocksError, PagedCacheError
from .free_blocks import FreeBlocks


@dataclass
class AllocatorCounters:
    """Blocks over the allocator's lifetime."""

    allocated: int = 0
    freed: int = 0
    evictions: int = 0


@dataclass
class ManagerCounters:
    """Events over the manager's lifetime; prefix counters are in tokens."""

    cow_copies: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class BlockAllocator:
    """Moves blocks between their states; nothing else changes reference counts.

    free -> (`allocate`) -> referenced -> (last `release`) -> cached, if the prefix index holds the block, else free.
    A cached block becomes referenced again through `acquire`, or free when it is evicted (least recently used first)
    or forgotten by the index.

    Args:
        num_blocks: Size of the pool.
        on_evict: Called with cached blocks, least recently used first, that are to leave the prefix index.

    Attributes:
        evict_ahead: Blocks that are evicted at least when one has to be, since they are cheaper together.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[list[int]], None] | None = None) -> None:
        if num_blocks < 1:
            raise InvalidRequestError(f"num_blocks is {num_blocks}; a pool needs at least 1 block.")
        self.num_blocks = num_blocks
        self.counters = AllocatorCounters()
        self.evict_ahead = 0
        self._on_evict = on_evict or (lambda blocks: None)
        self._free = FreeBlocks(range(num_blocks))
        self._ref_counts = [0] * num_blocks
        self._indexed: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now; cached ones count, since they are evicted on demand."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without a reference that still hold a reusable prefix."""
        return len(self._cached)

    def ref_count(self, block: int) -> int:
        """Number of tables that hold `block`."""
        return self._ref_counts[block]

    def is_private(self, block: int) -> bool:
        """Whether one table holds `block` and nothing else knows it, so that it may be written."""
        return self._ref_counts[block] == 1 and block not in self._indexed

    def is_indexed(self, block: int) -> bool:
        """Whether the prefix index holds `block`."""
        return block in self._indexed

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `allocate(num_blocks)` would succeed. No side effect."""
        return num_blocks <= self.num_free

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        """Gives `num_blocks` blocks with one reference each, evicting cached ones if it must.

        Args:
            num_blocks: How many.
            after: Block that they should lie behind, if that is possible.

        Raises:
            OutOfBlocksError: Too few blocks; nothing was changed.
        """
        if num_blocks > self.num_free:
            raise OutOfBlocksError(num_blocks, self.num_free)
        if len(self._free) < num_blocks:
            self.make_room(num_blocks)
        blocks = self._free.take(num_blocks, after)
        for block in blocks:
            self._ref_counts[block] = 1
        self.counters.allocated += num_blocks
        return blocks

    def make_room(self, num_blocks: int) -> None:
        """Evicts cached blocks, together, until `num_blocks` are free; the caller knows that so many can be."""
        lacking = num_blocks - len(self._free)
        if lacking > 0:
            self._evict(max(lacking, self.evict_ahead))

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds one reference to each of `blocks`, which are referenced or cached."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Takes one reference from each of `blocks` and returns those that became free.

        Blocks come to the eviction order as they are given: pass a sequence's last block first, so that the start of
        a prompt, which others are more likely to share, outlives its end.
        """
        freed = []
        for block in blocks:
            count = self._ref_counts[block] - 1
            if count < 0:
                raise PagedCacheError(f"block {block} was released more often than it was acquired")
            self._ref_counts[block] = count
            if count == 0:
                if block in self._indexed:
                    self._cached[block] = None
                else:
                    freed.append(block)
        self._add_free(freed)
        return freed

    def mark_indexed(self, block: int) -> None:
        """The prefix index now holds `block`: on its last release it stays as cached."""
        self._indexed.add(block)

    def unmark_indexed(self, block: int) -> None:
        """The prefix index let `block` go: a cached block becomes free."""
        self._indexed.discard(block)
        if block in self._cached:
            del self._cached[block]
            self._add_free([block])

    def recount(self, tables: Iterable[Sequence[int]]) -> list[int]:
        """Starts again with the references of `tables` and no cached block; returns the blocks that became free."""
        was_free = set(self._free)
        self._ref_counts = _count(tables, self.num_blocks)
        self._indexed, self._cached = set(), OrderedDict()
        self._free = FreeBlocks(block for block, count in enumerate(self._ref_counts) if count == 0)
        return [block for block in self._free if block not in was_free]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises `PagedCacheError` unless `tables` explain every reference and each block is in exactly one state."""
        counts = _count(tables, self.num_blocks)
        if counts != self._ref_counts:
            wrong = [(b, c, r) for b, (c, r) in enumerate(zip(counts, self._ref_counts, strict=True)) if c != r]
            raise PagedCacheError(f"references (block, in tables, counted): {wrong[:8]}")
        referenced = {block for block, count in enumerate(counts) if count}
        states = [*referenced, *self._cached, *self._free]
        if len(states) != self.num_blocks or len(set(states)) != self.num_blocks:
            raise PagedCacheError(
                f"{len(referenced)} referenced + {len(self._cached)} cached + {len(self._free)} free blocks "
                f"do not make {self.num_blocks} distinct ones"
            )
        if not set(self._cached) <= self._indexed:
            raise PagedCacheError("a cached block is not in the prefix index")
        if self._indexed & set(self._free):
            raise PagedCacheError("a free block is still in the prefix index")

    def _evict(self, num_blocks: int) -> None:
        """Frees the least recently used cached blocks."""
        blocks = list(islice(self._cached, num_blocks))
        self.counters.evictions += len(blocks)
        self._on_evict(blocks)
        for block in blocks:
            if block in self._cached:
                raise PagedCacheError(f"on_evict kept block {block} in the prefix index")

    def _add_free(self, blocks: list[int]) -> None:
        for block in blocks:
            self._free.add(block)
        self.counters.freed += len(blocks)


def _count(tables: Iterable[Sequence[int]], num_blocks: int) -> list[int]:
    counts = [0] * num_blocks
    for table in tables:
        for block in table:
            counts[block] += 1
    return counts
