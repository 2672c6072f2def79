"""Copies to host memory and back may fail, anywhere: the books stay right."""

from contextlib import suppress

import pytest

from paged_cache.errors import OutOfBlocksError, PagedCacheError
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.starting import Start
from tests.memory.fake_storage import FakeStorage, new_row
from tests.memory.test_failures import fails_at, interrupted_at

NUM_BLOCKS, NUM_HOST_BLOCKS = 16, 12
FIRST, SECOND, THIRD = [1] * 8, [2] * 8, [3] * 8


class HostScene:
    """A pool in which the return of one prompt evicts another, for which host memory gives up a third.

    Attributes:
        rows: One that is in use throughout.
    """

    def __init__(self, num_host_blocks: int = NUM_HOST_BLOCKS) -> None:
        self.manager = BlockManager(NUM_BLOCKS, 2, [None, 4], num_host_blocks=num_host_blocks)
        self.storage = FakeStorage(self.manager)
        self.rows = [new_row(self.manager)]
        self.storage.forward(self.rows, [[9, 9, 9]])
        for prompt in (FIRST, SECOND, THIRD):
            self.serve(prompt)
        self.check()

    def serve(self, prompt: list[int]) -> None:
        """A prompt comes, computes what is not known of it, and goes."""
        row = new_row(self.manager)
        self.begin(row, prompt)
        self.storage.forward([row], [prompt[len(row.tokens) :]])
        self.manager.release(row.sequence)

    def begin(self, row, prompt: list[int]) -> None:
        """A row begins with what is known of a prompt."""
        found = self.manager.match(row.sequence, prompt, len(prompt) - 1)
        self.manager.take_prefix(row.sequence, prompt, found)
        row.append(prompt[:found])
        row.floor = row.computed = found

    def come_back(self) -> None:
        """The first prompt is wanted again."""
        row = new_row(self.manager)
        self.begin(row, FIRST)
        self.rows.append(row)

    def check(self) -> None:
        self.manager.check()
        self.storage.check(self.rows)

    def assert_whole(self) -> None:
        """Everything goes on, and nothing is left behind."""
        self.check()
        while len(self.rows) > 1:
            self.manager.release(self.rows.pop().sequence)
        for prompt in (SECOND, THIRD, FIRST, SECOND):
            self.serve(prompt)
        self.check()
        self.manager.release(self.rows.pop().sequence)
        self.check()
        assert self.manager.num_free == NUM_BLOCKS


def test_the_scene_has_everything() -> None:
    """The return that is made to fail evicts, saves, gives up and restores; otherwise these tests show nothing."""
    scene = HostScene()
    host, evictions = scene.manager.host, scene.manager.allocator.counters.evictions
    offloaded, restored, given_up = host.counters.offloaded, host.counters.restored, []
    poison = host.on_free
    host.on_free = lambda blocks: (given_up.extend(blocks), poison(blocks))

    scene.come_back()

    scene.check()
    assert scene.manager.allocator.counters.evictions > evictions
    assert host.counters.offloaded > offloaded
    assert host.counters.restored > restored
    assert given_up


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("host", "on_save"),
        ("host", "on_load"),
        ("host", "save"),
        ("allocator", "allocate"),
        ("allocator", "acquire"),
        ("allocator", "release"),
        ("index", "put"),
        ("index", "prune"),
    ],
)
def test_the_kth_call_fails(owner: str, name: str) -> None:
    """For every k: when the k-th call of a return fails, no block is lost, and later prompts get what is right."""
    for k in range(100):
        scene = HostScene()
        target = getattr(scene.manager, owner)
        function = getattr(target, name)
        setattr(target, name, fails_at(k, function))
        with suppress(MemoryError):
            scene.come_back()
            break
        setattr(target, name, function)
        scene.assert_whole()
    assert 0 < k < 99


def test_interrupted_anywhere() -> None:
    """Ctrl-C before any line of a return: counts, tables, index and host blocks agree, and all blocks come back."""
    for k in range(1, 2000):
        scene = HostScene()
        with suppress(KeyboardInterrupt):
            with interrupted_at(k):
                scene.come_back()
            break
        scene.assert_whole()
    assert 50 < k < 1999


def test_no_room_changes_nothing() -> None:
    """A prefix for which there is no room is refused before anything is touched; `match` does not offer it."""
    scene = HostScene(num_host_blocks=40)
    manager = scene.manager
    other = new_row(manager)
    found = manager.match(other.sequence, FIRST, 7)
    start = Start(other.sequence, FIRST, found)
    assert manager.num_needed([start]) > 4
    hog = new_row(manager, None)
    scene.storage.forward([hog], [[5] * 2 * (manager.num_free - 7)])
    scene.rows.append(hog)
    free, used = manager.num_free, len(manager.host)
    assert manager.num_needed([start]) > free

    with pytest.raises(OutOfBlocksError):
        manager.take_prefixes([start])

    assert (manager.num_free, len(manager.host)) == (free, used)
    assert not any(other.sequence.tables)
    fewer = manager.match(other.sequence, FIRST, 7)
    assert fewer < found
    assert manager.num_needed([Start(other.sequence, FIRST, fewer)]) <= free
    scene.check()


def test_check_sees_what_is_wrong() -> None:
    """A host block that is lost, named twice or not findable is noticed."""
    for spoil, message in [
        (lambda host: host._free.append(host._free[-1] if host._free else 0), "distinct"),
        (lambda host: host._places.popitem(), "distinct"),
        (lambda host: next(iter(host._places.values()))[0].host_blocks.__setitem__(slice(None), [99, 99]), "not where"),
        (lambda host: [host._index.clear()], "cannot be found"),
    ]:
        scene = HostScene()
        spoil(scene.manager.host)
        with pytest.raises(PagedCacheError, match=message):
            scene.manager.host.check()
