"""Whatever fails, and whenever: the pool stays whole."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import paged_cache.memory
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.taking import BlockTaker
from tests.memory.fake_storage import FakeStorage, new_row

MEMORY = Path(paged_cache.memory.__file__).parent
FILES = {
    str(MEMORY / f"{name}.py")
    for name in (
        "allocator", "free_blocks", "growth", "manager", "offload", "prefix", "registering", "registry", "sequence",
        "starting", "taking",
    )
}  # fmt: skip
NUM_BLOCKS = 62
PROMPT = [1, 2, 3, 4, 5, 6, 7]


class Scene:
    """A pool in which one more step does everything: copies, hits, shared new blocks, evictions, windows.

    Attributes:
        rows: Two beams on one partly filled block, one that was cut back into an indexed block, two new ones.
        tokens: What they get next.
    """

    def __init__(self) -> None:
        self.manager = BlockManager(NUM_BLOCKS, 2, [None, 4])
        self.storage = FakeStorage(self.manager)
        beam, cut, old = (new_row(self.manager) for _ in range(3))
        self.storage.forward([beam], [PROMPT])
        self.storage.forward([cut], [[8, 8, 8, 8]])
        self.storage.forward([old], [[9] * 44])
        self.manager.release(old.sequence)
        self.manager.truncate(cut.sequence, 3)
        cut.cut(3)
        fork = beam.copy(self.manager.fork(beam.sequence))
        self.rows = [beam, fork, cut, new_row(self.manager), new_row(self.manager)]
        self.tokens = [[1, 2], [1, 3], [7, 7], [8, 8, 8, 8, 5, 5], [8, 8, 8, 8, 5, 5]]
        self.check()

    def check(self) -> None:
        self.manager.check()
        self.storage.check(self.rows)

    def roll_back(self, lengths: list[int]) -> None:
        """What a cache does when a forward did not return."""
        for row, length in zip(self.rows, lengths, strict=True):
            self.manager.truncate(row.sequence, length)
            row.cut(length)

    def step(self) -> None:
        """A forward that does not return if anything is wrong."""
        lengths = [len(row.tokens) for row in self.rows]
        try:
            self.storage.write(self.storage.extend(self.rows, self.tokens))
        except BaseException:
            self.roll_back(lengths)
            raise
        for row in self.rows:
            self.manager.commit(row.sequence)

    def assert_whole(self) -> None:
        """Rows are as they were or a whole step further, can go on, and leave nothing behind."""
        self.check()
        self.step()
        self.check()
        for row in self.rows:
            self.manager.release(row.sequence)
        self.rows = []
        self.check()
        assert self.manager.num_free == NUM_BLOCKS


def fails_at(k: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, failing instead of its k-th call."""
    calls = iter(range(k))

    def call(*args: Any) -> Any:
        if next(calls, None) is None:
            raise MemoryError
        return function(*args)

    return call


@contextmanager
def interrupted_at(k: int) -> Iterator[None]:
    """Ctrl-C before the k-th line of the bookkeeping that runs inside; a second one, while it tidies up, never comes."""
    left = k

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if code.co_filename not in FILES or code.co_name in {"run", "_repair"}:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_the_scene_has_everything() -> None:
    """The step that is made to fail copies, hits, shares and evicts; otherwise these tests show nothing."""
    scene = Scene()
    evictions, copies = scene.manager.allocator.counters.evictions, scene.manager.counters.cow_copies

    scene.step()

    scene.check()
    assert scene.manager.counters.cow_copies > copies
    assert scene.manager.allocator.counters.evictions > evictions
    full, _ = scene.rows[3].sequence.tables
    assert full == scene.rows[4].sequence.tables[0]
    assert full[0] == scene.rows[2].sequence.tables[0][0]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("allocator", "allocate"),
        ("allocator", "acquire"),
        ("allocator", "release"),
        ("manager", "on_copy"),
        ("manager", "_append"),
        ("manager", "_register"),
    ],
)
def test_the_kth_call_fails(owner: str, name: str) -> None:
    """For every k: when the k-th call of a step fails, the step did not happen, and no block is lost."""
    for k in range(100):
        scene = Scene()
        target = scene.manager.allocator if owner == "allocator" else scene.manager
        function = getattr(target, name)
        setattr(target, name, fails_at(k, function))
        try:
            scene.step()
        except MemoryError:
            setattr(target, name, function)
            scene.assert_whole()
        else:
            break
    assert 0 < k < 99


def test_a_step_takes_what_its_plan_has_counted() -> None:
    """Whether there are enough blocks is asked once, before anything is taken: there is no half of a step to take back."""
    scene = Scene()
    allocator, planner = scene.manager.allocator, scene.manager._planner
    planned, taken = [], []
    plan, allocate = planner.plan, allocator.allocate
    planner.plan = lambda growths: (result := plan(growths), planned.append(result.num_new))[0]
    allocator.allocate = lambda n, *after: (taken.append(n), allocate(n, *after))[1]

    scene.step()

    assert len(planned) == 1
    assert sum(taken) == planned[0] > 0


def extend(scene: Scene) -> None:
    scene.storage.extend(scene.rows, scene.tokens)


def commit(scene: Scene) -> None:
    scene.manager.commit(scene.rows[0].sequence)


def truncate(scene: Scene) -> None:
    scene.manager.truncate(scene.rows[0].sequence, 7)


def fork(scene: Scene) -> None:
    scene.manager.fork(scene.rows[0].sequence)


def select(scene: Scene) -> None:
    scene.manager.select([row.sequence for row in scene.rows], [0, 0, 1, 1])


def take_prefix(scene: Scene) -> None:
    row = new_row(scene.manager)
    scene.rows.append(row)
    scene.manager.take_prefix(row.sequence, [8, 8, 8, 8], 4)


def release(scene: Scene) -> None:
    scene.manager.release(scene.rows[0].sequence)


def abandon(scene: Scene) -> None:
    scene.manager.abandon(row.sequence for row in scene.rows[:2])
    assert scene.manager.num_free


def clear(scene: Scene) -> None:
    scene.manager.clear_prefix_cache()


@pytest.mark.parametrize("operation", [extend, commit, truncate, fork, select, take_prefix, release, abandon, clear])
def test_interrupted_anywhere(operation: Callable[[Scene], None]) -> None:
    """Ctrl-C before any line of any operation: counts, tables and index agree, and all blocks come back."""
    for k in range(1, 2000):
        scene = Scene()
        extended = operation in (commit, truncate)
        if extended:
            scene.storage.write(scene.storage.extend(scene.rows[:1], [[1, 2]]))
        try:
            with interrupted_at(k):
                operation(scene)
        except KeyboardInterrupt:
            pass
        else:
            break
        scene.manager.check()
        if operation is extend:
            lengths = [row.sequence.num_tokens for row in scene.rows]
            assert lengths in ([7, 7, 3, 0, 0], [9, 9, 5, 6, 6])
            scene.roll_back([7, 7, 3, 0, 0])
            scene.assert_whole()
            continue
        for row in scene.rows:
            scene.manager.release(row.sequence)
        scene.rows = row = None
        scene.manager.check()
        assert scene.manager.num_free == NUM_BLOCKS, k
    assert 5 < k < 1999


def test_a_lost_sequence_gives_its_blocks_back() -> None:
    """A sequence that nobody holds any more, because its caller was interrupted, costs nothing."""
    scene = Scene()
    free = scene.manager.num_free
    lost = new_row(scene.manager, "other")
    scene.storage.forward([lost], [[1, 2, 3]])
    scene.manager.fork(lost.sequence)
    assert scene.manager.num_free < free

    del lost

    scene.check()
    assert scene.manager.num_free == free


def test_a_failed_copy_leaves_the_tables_alone() -> None:
    """Copies are made before a table has the copy: when one fails (out of memory), rows still have what they had."""
    scene = Scene()
    tables = [[list(table) for table in row.sequence.tables] for row in scene.rows]

    def fail(pairs: list[tuple[int, int]]) -> None:
        assert pairs
        raise MemoryError

    scene.manager.on_copy = fail
    with pytest.raises(MemoryError):
        scene.storage.extend(scene.rows, scene.tokens)

    assert [row.sequence.tables for row in scene.rows] == tables
    scene.manager.on_copy = scene.storage.copy
    scene.assert_whole()


def test_interruption_in_the_taker_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error nobody thought of, in the middle of a step, is raised and leaves the pool whole."""
    scene = Scene()
    monkeypatch.setattr(BlockTaker, "_slots", fails_at(3, BlockTaker._slots))
    with pytest.raises(MemoryError):
        scene.storage.extend(scene.rows, scene.tokens)

    monkeypatch.undo()
    scene.assert_whole()
