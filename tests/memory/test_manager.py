"""Sequences are forked, cut, selected and given back; what nobody sees any more returns to the pool."""

import threading

import pytest

from paged_cache.memory.manager import BlockManager
from paged_cache.memory.sequence import HOLE, Sequence
from tests.memory.fake_storage import FakeStorage, Row, new_row


def prompt(manager: BlockManager, tokens: list[int]) -> tuple[FakeStorage, Row]:
    """A row that holds `tokens`."""
    storage, row = FakeStorage(manager), new_row(manager)
    storage.forward([row], [tokens])
    return storage, row


def test_blocks_behind_a_window_go_back() -> None:
    """A long sequence holds only what its window sees; groups without a window keep everything."""
    manager = BlockManager(64, 2, [None, 4], prefix_caching=False)
    storage, row = FakeStorage(manager), Row(manager.new_sequence(), "root")

    for i in range(20):
        storage.forward([row], [[i]])
        full, sliding = row.sequence.tables
        assert HOLE not in full
        assert sum(block != HOLE for block in sliding) <= 4 // 2 + 1

    storage.check([row])
    assert sliding[:8] == [HOLE] * 8
    assert sliding[8:] != [HOLE] * 2
    assert manager.num_free == 64 - 10 - 2


def test_a_window_that_ends_with_a_block_keeps_just_that() -> None:
    """The next token sees window - 1 tokens of the past: with 8 tokens and a window of 5 the first block is behind."""
    manager = BlockManager(8, 4, [5])
    storage, row = prompt(manager, [1, 2, 3, 4, 5, 6, 7])
    assert HOLE not in row.sequence.tables[0]

    storage.forward([row], [[8]])

    assert row.sequence.tables[0][0] == HOLE
    assert manager.can_truncate(row.sequence, 8)
    assert not manager.can_truncate(row.sequence, 7)


def test_the_past_stays_as_long_as_it_may_come_back() -> None:
    """With `keep_past` a sequence can be cut to where it was before the step; then the window moves on."""
    manager = BlockManager(16, 2, [4])
    storage, row = prompt(manager, [1, 2, 3, 4])

    storage.forward([row], [[5, 6, 7, 8, 9]], keep_past=True)
    assert manager.can_truncate(row.sequence, 4)
    manager.truncate(row.sequence, 6)
    row.cut(6)
    storage.check([row])

    manager.commit(row.sequence)
    storage.check([row])
    assert row.sequence.tables[0][0] == HOLE


@pytest.mark.parametrize("num_tokens", range(8))
def test_cutting_keeps_the_start(num_tokens: int) -> None:
    """A cut sequence holds its first tokens, no block more, and can go on differently."""
    manager = BlockManager(8, 3, [None])
    storage, row = prompt(manager, [1, 2, 3, 4, 5, 6, 7])

    manager.truncate(row.sequence, num_tokens)
    row.cut(num_tokens)
    manager.check()
    storage.check([row])
    assert len(row.sequence.tables[0]) == -(-num_tokens // 3)

    storage.forward([row], [[9, 9, 9]])
    manager.check()
    storage.check([row])


def test_an_open_step_is_taken_back() -> None:
    """After a failed forward nothing of it is in the tables or the index, and the same tokens can come again."""
    manager = BlockManager(8, 2, [None])
    storage, row = prompt(manager, [1, 2, 3])

    step = storage.extend([row], [[4, 5, 6]])
    storage.abort(step)

    manager.check()
    assert len(manager.index) == 1
    assert row.sequence.tables == [[0, 1]]
    storage.forward([row], [[4, 5, 6]])
    storage.check([row])


def test_forks_cost_nothing() -> None:
    """Any number of forks hold the blocks of one."""
    manager = BlockManager(4, 2, [None])
    storage, row = prompt(manager, [1, 2, 3])

    rows = [row, *(row.copy(manager.fork(row.sequence)) for _ in range(10))]

    assert manager.num_free == 2
    for each in rows:
        manager.check()
        storage.check([each])
        manager.release(each.sequence)
    assert manager.num_free == 4


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 2, 0], [1, 1, 1, 1], [-1, 2, 0], [-1, -1], []])
def test_select_moves_forks_and_releases(indices: list[int]) -> None:
    """Row `i` is what row `indices[i]` was, negative indices too; nothing is copied, and rows not named go."""
    manager = BlockManager(16, 2, [None])
    storage = FakeStorage(manager)
    rows = [new_row(manager) for _ in range(3)]
    storage.forward(rows, [[i] * 3 for i in range(3)])

    sequences = manager.select([row.sequence for row in rows], indices)

    selected = [rows[i].copy(sequence) for i, sequence in zip(indices, sequences, strict=True)]
    manager.check()
    storage.check(selected)
    assert len({id(sequence) for sequence in sequences}) == len(indices)
    assert manager.counters.cow_copies == 0
    for sequence in sequences:
        manager.release(sequence)
    assert manager.num_free == 16


def test_releasing_twice_does_nothing() -> None:
    """The second release finds nothing to give back, also after the sequence was abandoned."""
    manager = BlockManager(4, 2, [None])
    _, row = prompt(manager, [1, 2, 3])

    manager.abandon([row.sequence])
    manager.release(row.sequence)
    manager.release(row.sequence)

    manager.check()
    assert manager.num_free == 4


def test_abandoned_blocks_are_there_when_they_are_needed() -> None:
    """What a finalizer left is taken back before a step is told that blocks are short."""
    manager = BlockManager(2, 2, [None])
    storage, row = prompt(manager, [1, 2, 3])
    manager.abandon([row.sequence])

    storage.forward([new_row(manager, "other")], [[5, 6, 7]])

    manager.check()


def test_a_prefix_is_taken_without_a_copy() -> None:
    """A new sequence stands on the blocks of the old one, may end within one, and copies that before it writes."""
    manager = BlockManager(8, 4, [None])
    storage, row = prompt(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    other = new_row(manager)

    manager.take_prefix(other.sequence, [1, 2, 3, 4, 5, 6, 7, 8], 6)
    other.append([1, 2, 3, 4, 5, 6])
    other.computed = 6
    assert other.sequence.tables == row.sequence.tables
    step = storage.forward([other], [[9]])

    manager.check()
    storage.check([row, other])
    assert step.writes.copies == [(1, 2)]


def test_sequences_that_do_not_share_take_nothing() -> None:
    """Without a root key there is nothing to match and nothing to take."""
    manager = BlockManager(8, 2, [None])
    prompt(manager, [1, 2, 3, 4])
    sequence = manager.new_sequence()

    assert manager.match(sequence, [1, 2, 3, 4], 4) == 0
    manager.take_prefix(sequence, [1, 2, 3, 4], 0)
    manager.check()


def test_versions_are_never_used_twice() -> None:
    """Tables on a device are recognised by version, so no two sequences ever have the same, however old.

    They were counted per sequence: a new sequence at the address of a dead one, as after `reset`, passed for it.
    """
    seen = {Sequence(1).version for _ in range(100)}
    assert len(seen) == 100

    manager = BlockManager(8, 2, [None])
    storage, row = prompt(manager, [1, 2, 3])
    fork = row.copy(manager.fork(row.sequence))
    assert fork.sequence.version != row.sequence.version
    before = row.sequence.version
    storage.forward([row], [[4]])
    assert row.sequence.version not in (before, fork.sequence.version)


def test_versions_change_with_the_tables_only() -> None:
    """A step that stays within its block does not make tables on a device stale."""
    manager = BlockManager(8, 4, [None])
    storage, row = prompt(manager, [1, 2])
    before = row.sequence.version

    storage.forward([row], [[3]])
    assert row.sequence.version == before
    storage.forward([row], [[4, 5]])
    assert row.sequence.version != before


def test_threads_may_share_a_manager() -> None:
    """Steps of several threads do not get in each other's way."""
    manager = BlockManager(64, 2, [None, 4])
    errors = []

    def work(seed: int) -> None:
        storage = FakeStorage(manager)
        try:
            for i in range(30):
                row = new_row(manager)
                tokens = [seed % 2, i % 3, 1, 2, 3, 4]
                with manager.lock:
                    found = manager.match(row.sequence, tokens, 5)
                    manager.take_prefix(row.sequence, tokens, found)
                row.append(tokens[:found])
                storage.forward([row], [tokens[found:]])
                manager.select([row.sequence], [0, 0])
                manager.abandon([row.sequence])
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test reports it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    manager.check()
    assert manager.num_free == 64
