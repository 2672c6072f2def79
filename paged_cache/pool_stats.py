"""Counters of a pool at one moment."""

from dataclasses import dataclass

from .memory.manager import BlockManager


@dataclass(frozen=True)
class PoolStats:
    """A pool at one moment.

    Attributes:
        num_blocks, num_free, num_cached, num_referenced: Blocks by state; `num_free` includes the cached ones.
        allocated, freed, evictions, cow_copies: Blocks over the pool's lifetime.
        prefix_queries, prefix_hits: Prompt tokens looked up, and those found, over the pool's lifetime.
        nbytes: Bytes of K and V that the pool holds, scales included.
        offloaded, restored: Blocks that were copied to host memory when they were evicted, and back, over the pool's
            lifetime.
        not_offloaded: Evicted ones that were not copied, because computing them again is cheaper.
        num_offloaded: Blocks that host memory holds.
    """

    num_blocks: int
    num_free: int
    num_cached: int
    num_referenced: int
    allocated: int
    freed: int
    evictions: int
    cow_copies: int
    prefix_queries: int
    prefix_hits: int
    nbytes: int
    offloaded: int
    restored: int
    not_offloaded: int
    num_offloaded: int

    @classmethod
    def of(cls, manager: BlockManager, nbytes: int) -> "PoolStats":
        """Counts of now; `nbytes` of K and V."""
        allocator, num_free = manager.allocator, manager.num_free
        return cls(
            num_blocks=allocator.num_blocks,
            num_free=num_free,
            num_cached=manager.num_cached,
            num_referenced=allocator.num_blocks - num_free,
            allocated=allocator.counters.allocated,
            freed=allocator.counters.freed,
            evictions=allocator.counters.evictions,
            cow_copies=manager.counters.cow_copies,
            prefix_queries=manager.counters.prefix_queries,
            prefix_hits=manager.counters.prefix_hits,
            nbytes=nbytes,
            **vars(manager.host.counters),
            num_offloaded=len(manager.host),
        )
