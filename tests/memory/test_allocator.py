"""Blocks move between free, referenced and cached, and nothing is lost on the way."""

import pytest

from paged_cache.errors import InvalidRequestError, OutOfBlocksError, PagedCacheError
from paged_cache.memory.allocator import BlockAllocator


def cached(num_blocks: int) -> BlockAllocator:
    """An allocator whose blocks 0, 1, … were released in this order and are all in the prefix index."""
    allocator = BlockAllocator(num_blocks, lambda blocks: [allocator.unmark_indexed(block) for block in blocks])
    for block in allocator.allocate(num_blocks):
        allocator.mark_indexed(block)
        allocator.release([block])
    return allocator


def test_a_pool_has_blocks() -> None:
    """A pool without blocks is refused."""
    with pytest.raises(InvalidRequestError, match="num_blocks is 0"):
        BlockAllocator(0)


def test_allocation_is_all_or_nothing() -> None:
    """A request for more blocks than are free names both numbers and changes nothing."""
    allocator = BlockAllocator(4)
    held = allocator.allocate(3)

    assert allocator.can_allocate(1)
    assert not allocator.can_allocate(2)
    with pytest.raises(OutOfBlocksError) as caught:
        allocator.allocate(2)

    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert allocator.num_free == 1
    assert allocator.counters.allocated == 3
    allocator.check([held])


def test_nothing_is_always_there() -> None:
    """Zero blocks can be had from a full pool."""
    allocator = BlockAllocator(1)
    allocator.allocate(1)

    assert allocator.allocate(0) == []


def test_released_blocks_are_used_again_first() -> None:
    """A sequence that comes after another gets the blocks that were just given back, in the order of memory."""
    allocator = BlockAllocator(8)
    blocks = allocator.allocate(3)

    assert allocator.release(reversed(blocks)) == [2, 1, 0]
    assert allocator.allocate(3) == [0, 1, 2]


def test_a_block_is_free_when_its_last_table_lets_go() -> None:
    """References are counted one by one."""
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate(1)
    allocator.acquire([block])

    assert allocator.release([block]) == []
    assert allocator.ref_count(block) == 1
    assert allocator.release([block]) == [block]
    assert allocator.num_free == 2


def test_an_indexed_block_is_cached_when_it_is_released() -> None:
    """A block that the prefix index holds keeps its content, and still counts as free."""
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate(1)
    allocator.mark_indexed(block)

    assert allocator.release([block]) == []
    assert (allocator.num_free, allocator.num_cached) == (2, 1)

    allocator.acquire([block])
    assert (allocator.num_free, allocator.num_cached) == (1, 0)


def test_a_block_that_the_index_lets_go_is_free() -> None:
    """A cached block becomes free at once, a referenced one when it is released."""
    allocator = BlockAllocator(2)
    first, second = allocator.allocate(2)
    for block in (first, second):
        allocator.mark_indexed(block)
    allocator.release([first])

    allocator.unmark_indexed(first)
    allocator.unmark_indexed(second)

    assert (allocator.num_free, allocator.num_cached) == (1, 0)
    assert allocator.release([second]) == [second]


def test_blocks_are_evicted_least_recently_used_first() -> None:
    """Eviction follows the order of the last release, and a use in between moves a block to the end."""
    allocator = cached(4)
    allocator.acquire([1])
    allocator.release([1])
    evicted = []
    allocator._on_evict = lambda blocks: [(evicted.append(block), allocator.unmark_indexed(block)) for block in blocks]

    allocator.allocate(4)

    assert evicted == [0, 2, 3, 1]
    assert allocator.counters.evictions == 4


def test_no_more_is_evicted_than_needed() -> None:
    """Free blocks go first; cached ones stay as long as they can."""
    allocator = cached(4)
    allocator.make_room(1)

    allocator.allocate(2)

    assert allocator.num_cached == 2
    assert allocator.counters.evictions == 2


def test_what_is_evicted_together() -> None:
    """An index hears of all blocks that make room for one call at once, and of more than needed where that is cheaper."""
    allocator, calls = cached(6), []
    forget = allocator._on_evict
    allocator._on_evict = lambda blocks: (calls.append(blocks), forget(blocks))

    allocator.allocate(2)
    allocator.evict_ahead = 3
    allocator.allocate(1)
    allocator.allocate(2)
    allocator.allocate(1)

    assert calls == [[0, 1], [2, 3, 4], [5]]
    assert allocator.num_free == 0


def test_too_many_releases_are_noticed() -> None:
    """A block that nobody holds cannot be released."""
    allocator = BlockAllocator(1)

    with pytest.raises(PagedCacheError, match="block 0 was released more often"):
        allocator.release([0])


def test_an_index_that_keeps_an_evicted_block_is_noticed() -> None:
    """Eviction must not run forever when the index does not let go."""
    allocator = cached(1)
    allocator._on_evict = lambda blocks: None

    with pytest.raises(PagedCacheError, match="kept block 0"):
        allocator.allocate(1)


def test_recount_believes_the_tables() -> None:
    """After a recount every block in a table is referenced as often as it is there, and every other block is free."""
    allocator = cached(5)
    allocator.allocate(2)
    allocator.acquire([2])
    was_free = set(allocator._free)

    freed = allocator.recount([[2, 3], [3]])

    allocator.check([[2, 3], [3]])
    assert [allocator.ref_count(block) for block in range(5)] == [0, 0, 1, 2, 0]
    assert set(freed) == {0, 1, 4} - was_free
    assert allocator.num_cached == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a._ref_counts.__setitem__(0, 2), r"references .* \[\(0, 1, 2\)\]"),
        (lambda a: a._free.add(0), "do not make 4 distinct ones"),
        (lambda a: a._free.take(1), "do not make 4 distinct ones"),
        (lambda a: a._indexed.discard(1), "a cached block is not in the prefix index"),
        (lambda a: a._indexed.add(3), "a free block is still in the prefix index"),
    ],
)
def test_check_finds_damage(damage: object, message: str) -> None:
    """Each kind of wrong bookkeeping is found and named."""
    allocator = BlockAllocator(4)
    table = allocator.allocate(1)
    (other,) = allocator.allocate(1)
    allocator.mark_indexed(other)
    allocator.release([other])
    allocator.check([table])

    damage(allocator)

    with pytest.raises(PagedCacheError, match=message):
        allocator.check([table])
