"""Free blocks are a set, and a sequence's blocks lie side by side where they can."""

from hypothesis import given
from hypothesis import strategies as st

from paged_cache.memory.allocator import BlockAllocator
from paged_cache.memory.free_blocks import ROOM, FreeBlocks

NUM_BLOCKS = 24


@given(
    st.lists(st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(0, NUM_BLOCKS)), st.randoms()), max_size=40)
)
def test_it_is_a_set(steps: list[tuple[int, int | None, object]]) -> None:
    """Whatever is taken and given back in whatever order, no block is lost or there twice, and extents are maximal."""
    free, held = FreeBlocks(range(NUM_BLOCKS)), []
    for count, after, random in steps:
        if count <= len(free):
            follows = after is not None and after + 1 in free._end_of
            taken = free.take(count, after)
            assert len(taken) == count
            assert not (follows and taken) or taken[0] == after + 1
            held += taken
        random.shuffle(held)  # type: ignore[attr-defined]
        for _ in range(min(len(held), 4)):
            free.add(held.pop())

        assert len(free) == NUM_BLOCKS - len(held)
        assert sorted([*free, *held]) == list(range(NUM_BLOCKS))
        ends = [free._end_of[start] for start in free._starts]
        assert all(end < start for end, start in zip(ends, free._starts[1:], strict=False))
        assert free._start_of == {end: start for start, end in free._end_of.items()}


def test_a_sequence_continues_behind_its_last_block() -> None:
    """Two sequences that grow in turns do not interleave."""
    allocator = BlockAllocator(4 * ROOM)
    first, second = allocator.allocate(2), allocator.allocate(2)
    for _ in range(ROOM):
        first += allocator.allocate(1, after=first[-1])
        second += allocator.allocate(1, after=second[-1])

    assert [first, second] == [[*range(start, start + ROOM + 2)] for start in (0, ROOM + 2)]


def test_the_last_blocks_can_be_had() -> None:
    """Room is a wish: when nothing else is left, blocks between sequences are taken, the longest extent first."""
    allocator = BlockAllocator(3 * ROOM)
    held = [allocator.allocate(1), allocator.allocate(1)]

    rest = allocator.allocate(3 * ROOM - 2)

    assert sorted([*held[0], *held[1], *rest]) == list(range(3 * ROOM))
    assert allocator.num_free == 0
