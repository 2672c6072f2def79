"""Blocks are found by what they hold, and by nothing that merely looks like it."""

import gc

import pytest

from paged_cache.errors import PagedCacheError
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.prefix import PrefixIndex, PrefixNode
from tests.memory.fake_storage import FakeStorage, Row, new_row

MODULUS = 2**61 - 1  # of Python's hash of an int
COLLISIONS = [((-1, 5), (-2, 5)), ((3, 7), (3 + MODULUS, 7)), ((0, 0), (MODULUS, 0)), ((1, -1), (1, -2))]


def nodes_of(index: PrefixIndex, root: PrefixNode, *blocks: tuple[int, ...]) -> list[PrefixNode]:
    """Puts blocks 0, 1, … of group 0 behind each other."""
    nodes = []
    for tokens in blocks:
        nodes.append(index.insert(nodes[-1] if nodes else root, tokens))
        index.put(nodes[-1], 0, len(index))
    return nodes


def cached_prompt(manager: BlockManager, storage: FakeStorage, tokens: list[int], root: str = "root") -> None:
    """Runs a prompt and lets go of it."""
    row = new_row(manager, root)
    storage.forward([row], [tokens])
    manager.release(row.sequence)


def found(manager: BlockManager, tokens: list[int], root: str = "root") -> int:
    """Tokens that a new sequence can take."""
    row = new_row(manager, root)
    num_tokens = manager.match(row.sequence, tokens, len(tokens))
    manager.release(row.sequence)
    return num_tokens


@pytest.mark.parametrize(("mine", "theirs"), COLLISIONS)
def test_equal_hashes_are_different_tokens(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    """Token ids are compared: two blocks whose hashes really collide never stand for each other."""
    assert hash(mine) == hash(theirs)
    manager = BlockManager(8, 2, [None])
    storage = FakeStorage(manager)
    cached_prompt(manager, storage, list(mine))

    assert found(manager, list(theirs)) == 0
    cached_prompt(manager, storage, list(theirs))
    assert found(manager, list(mine)) == found(manager, list(theirs)) == 2
    assert manager.num_cached == 2


@pytest.mark.parametrize(("mine", "theirs"), COLLISIONS)
def test_equal_hashes_in_one_step_do_not_share(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    """Rows whose blocks collide get blocks of their own, and so do the same tokens behind them."""
    manager = BlockManager(8, 2, [None])
    storage = FakeStorage(manager)
    rows = [new_row(manager), new_row(manager)]

    storage.forward(rows, [[*mine, 1, 1], [*theirs, 1, 1]])

    storage.check(rows)
    assert not set(rows[0].sequence.tables[0]) & set(rows[1].sequence.tables[0])


def test_a_collision_behind_a_cached_prefix_is_no_hit() -> None:
    """The chain is compared from the root on: a colliding first block hides all that follows."""
    manager = BlockManager(8, 2, [None])
    cached_prompt(manager, FakeStorage(manager), [-1, -1, 4, 4])

    assert found(manager, [-2, -2, 4, 4]) == 0
    assert found(manager, [-1, -1, 4, 4]) == 4


def test_roots_separate() -> None:
    """What was computed under one key (weights, adapter, salt) is not found under another."""
    manager = BlockManager(8, 2, [None])
    cached_prompt(manager, FakeStorage(manager), [1, 2, 3, 4], root="tenant a")

    assert found(manager, [1, 2, 3, 4], root="tenant a") == 4
    assert found(manager, [1, 2, 3, 4], root="tenant b") == 0


def test_a_match_is_a_whole_number_of_blocks_or_the_limit() -> None:
    """Only full blocks are in the index; a limit may lie within one."""
    manager = BlockManager(8, 4, [None])
    cached_prompt(manager, FakeStorage(manager), [1, 2, 3, 4, 5, 6])
    row = new_row(manager)

    assert manager.match(row.sequence, [1, 2, 3, 4, 5, 6], 6) == 4
    assert manager.match(row.sequence, [1, 2, 3, 4, 5, 6], 3) == 3
    assert manager.match(row.sequence, [1, 2, 3], 3) == 0


def test_the_end_of_a_prompt_is_evicted_before_its_start() -> None:
    """Under pressure a prompt is forgotten from its end, so that its start stays a prefix."""
    manager = BlockManager(4, 2, [None])
    storage = FakeStorage(manager)
    cached_prompt(manager, storage, [1, 2, 3, 4, 5, 6, 7, 8])
    lengths = []

    other = new_row(manager, "other")
    for i in range(4):
        storage.forward([other], [[i, i]])
        lengths.append(found(manager, [1, 2, 3, 4, 5, 6, 7, 8]))

    assert lengths == [6, 4, 2, 0]


def test_the_prompt_used_last_is_evicted_last() -> None:
    """A hit counts as a use."""
    manager = BlockManager(4, 1, [None])
    storage = FakeStorage(manager)
    for token in (1, 2, 3):
        cached_prompt(manager, storage, [token])
    row = new_row(manager)
    manager.take_prefix(row.sequence, [1], 1)
    manager.release(row.sequence)

    other = new_row(manager, "other")
    storage.forward([other], [[7, 7, 7]])

    assert [found(manager, [token]) for token in (1, 2, 3)] == [1, 0, 0]


def test_eviction_in_the_middle_hides_the_rest() -> None:
    """Without a block in the middle only what is before it can be taken; once it is computed again, all can."""
    manager = BlockManager(8, 1, [None])
    storage = FakeStorage(manager)
    cached_prompt(manager, storage, [1, 2, 3])
    (middle,) = (block for block, (node, _) in manager.index._places.items() if node.tokens == (2,))
    manager._forget(middle)

    assert found(manager, [1, 2, 3]) == 1
    cached_prompt(manager, storage, [1, 2])
    assert found(manager, [1, 2, 3]) == 3


def test_a_window_needs_only_the_blocks_it_sees() -> None:
    """A prefix can be taken though its start is gone, if no group still sees that start."""
    manager = BlockManager(16, 2, [4])
    storage = FakeStorage(manager)
    cached_prompt(manager, storage, [1, 2, 3, 4, 5, 6, 7, 8])
    for block in [block for block, (node, _) in manager.index._places.items() if node.depth <= 2]:
        manager._forget(block)

    assert found(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == 8
    row = new_row(manager)
    manager.take_prefix(row.sequence, [1, 2, 3, 4, 5, 6, 7, 8], 8)
    row.append([1, 2, 3, 4, 5, 6, 7, 8])
    row.computed = 8
    storage.check([row])
    assert row.sequence.tables[0][:2] == [-1, -1]
    manager.check()


def test_a_long_prefix_that_lost_its_window_is_no_problem() -> None:
    """Thousands of blocks of which one group has none left are looked through without recursion."""
    manager = BlockManager(10_000, 1, [None, 4])
    storage = FakeStorage(manager)
    tokens = list(range(4_000))
    cached_prompt(manager, storage, tokens)
    for block in [block for block, (_, group) in manager.index._places.items() if group == 1]:
        manager._forget(block)

    assert found(manager, tokens) == 0


def test_nodes_without_blocks_are_pruned() -> None:
    """A node goes when it holds nothing and leads nowhere, and then its parents do."""
    index = PrefixIndex(1)
    root = index.root("key")
    nodes_of(index, root, (1,), (2,), (3,))

    index.remove(1)
    assert index.match(root, [1, 2, 3], 1) != []
    index.remove(2)
    assert [node.tokens for node in index.match(root, [1, 2, 3], 1)] == [(1,)]
    index.remove(0)
    assert not root.children
    index.check(set())


def test_a_pruned_node_is_put_back_by_what_comes_behind_it() -> None:
    """A sequence whose node was pruned still registers its next block where others find it."""
    index = PrefixIndex(1)
    root = index.root("key")
    _, last = nodes_of(index, root, (1,), (2,))
    index.remove(1)
    index.remove(0)

    index.put(index.insert(last, (3,)), 0, 5)

    assert [node.tokens for node in index.match(root, [1, 2, 3], 1)] == [(1,), (2,), (3,)]
    index.check({5})


def test_a_pruned_node_gives_way_to_its_successor() -> None:
    """When the same tokens came back meanwhile, the old node stays out: two nodes for one prefix would lose blocks.

    Marked as attached it collected blocks that nobody could find, and took its successor away when they went.
    """
    index = PrefixIndex(1)
    root = index.root("key")
    (old,) = nodes_of(index, root, (1,))
    index.remove(0)
    (new,) = nodes_of(index, root, (1,))

    for block, tokens in ((5, (2,)), (6, (3,))):
        index.put(index.insert(old, tokens), 0, block)
    index.check({0, 5, 6})
    assert new.children.keys() == {(2,), (3,)}

    index.remove(6)
    index.remove(5)
    assert index.match(root, [1], 1) == [new]


def test_a_root_lives_as_long_as_its_blocks() -> None:
    """Keys of old weights and of tenants that are gone do not pile up."""
    index = PrefixIndex(1)
    nodes_of(index, index.root("used"), (1,))
    index.root("unused")
    gc.collect()

    assert list(index._roots) == ["used"]
    index.remove(0)
    gc.collect()
    assert not index._roots


def test_a_place_is_taken_once() -> None:
    """Neither a block nor its place in the index is given away twice."""
    index = PrefixIndex(1)
    root = index.root("key")
    nodes_of(index, root, (1,))

    with pytest.raises(PagedCacheError, match="taken already"):
        index.put(index.insert(root, (1,)), 0, 7)
    with pytest.raises(PagedCacheError, match="taken already"):
        index.put(index.insert(root, (2,)), 0, 0)


def test_clearing_stops_sharing_of_what_is_in_use() -> None:
    """After the cache was cleared, sequences from before share neither old nor new blocks."""
    manager = BlockManager(8, 2, [None])
    storage = FakeStorage(manager)
    row: Row = new_row(manager)
    storage.forward([row], [[1, 2, 3]])

    manager.clear_prefix_cache()
    storage.forward([row], [[4, 5, 6]])

    manager.check()
    assert found(manager, [1, 2, 3, 4, 5, 6]) == 0
    manager.release(row.sequence)
    assert manager.num_cached == 0


def test_nothing_is_cached_without_prefix_caching() -> None:
    """A pool that must not cache forgets a prompt with its sequence."""
    manager = BlockManager(8, 2, [None], prefix_caching=False)
    cached_prompt(manager, FakeStorage(manager), [1, 2, 3, 4])

    assert manager.num_cached == 0
    assert found(manager, [1, 2, 3, 4]) == 0
