"""Any order of operations on a small pool with a small host memory: what comes back holds the right tokens."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, precondition, rule

from paged_cache.memory.manager import BlockManager
from paged_cache.memory.prefix import PrefixNode
from paged_cache.memory.starting import Start
from tests.memory.fake_storage import POISON
from tests.memory.test_invariants import MAX_ROWS, ROOTS, Pool, path, tell, wrong_tokens

totals = {"offloaded": 0, "restored": 0, "not_offloaded": 0}


class Verdict:
    """Costs that say what the test wants."""

    def __init__(self) -> None:
        self.saving = self.restoring = True

    def pays_saving(self) -> bool:
        return self.saving

    def pays_restoring(self, num_blocks: int, num_tokens: int) -> bool:
        assert num_blocks > 0
        assert num_tokens > 0
        return self.restoring

    def observe_copy(self, num_blocks: int, seconds: float) -> None:
        assert num_blocks > 0

    def observe_forward(self, num_tokens: int, seconds: float) -> None:
        raise AssertionError("no step here is long")


class OffloadingPool(Pool):
    """The same with a second tier."""

    @initialize(
        num_blocks=st.integers(4, 14),
        num_host_blocks=st.sampled_from((1, 2, 3, 5, 8, 40)),
        block_size=st.sampled_from((1, 2, 2, 4)),
        windows=st.sampled_from(((None,), (None,), (None, None), (None, 6), (5,), (2,), (None, 3, 1))),
        evict_ahead=st.sampled_from((0, 0, 2, 5)),
    )
    def start_pool(
        self, num_blocks: int, num_host_blocks: int, block_size: int, windows: tuple, evict_ahead: int
    ) -> None:
        with_host = BlockManager(num_blocks * len(windows), block_size, windows, True, num_host_blocks * len(windows))
        with_host.allocator.evict_ahead = evict_ahead
        with_host.host.costs = self.verdict = Verdict()
        self._start(with_host)

    @rule(saving=st.sampled_from((True, True, True, False)), restoring=st.sampled_from((True, True, True, False)))
    def judge(self, saving: bool, restoring: bool) -> None:
        """From here on copies pay or do not."""
        self.verdict.saving, self.verdict.restoring = saving, restoring

    @precondition(lambda self: len(self.rows) < MAX_ROWS - 2)
    @rule(
        root=st.sampled_from(ROOTS[:-1]),
        counts=st.lists(st.integers(0, 20), min_size=2, max_size=3),
        wrong=wrong_tokens,
    )
    def start_together(self, root: str, counts: list[int], wrong: int | None) -> None:
        """Rows begin with what is known of them, if there is room for all."""
        rows = [self._new(root) for _ in counts]
        tokens = [tell(0, count, wrong) for count in counts]
        found = [self.manager.match(row.sequence, ids, len(ids)) for row, ids in zip(rows, tokens, strict=True)]
        starts = [Start(row.sequence, *start) for row, *start in zip(rows, tokens, found, strict=True)]
        needed, free = self.manager.num_needed(starts), self.manager.num_free
        if needed > free:
            return
        self.manager.take_prefixes(starts)
        assert self.manager.num_free == free - needed
        for row, ids, count in zip(rows, tokens, found, strict=True):
            row.append(ids[:count])
            row.floor = row.computed = count
        self.rows += rows

    @precondition(lambda self: self.has_room())
    @rule(
        root=st.sampled_from(ROOTS[:-1]),
        counts=st.lists(st.integers(1, 24), min_size=2, max_size=4),
        wrong=st.integers(0, 4),
        limit=st.integers(1, 24),
    )
    def come_back(self, root: str, counts: list[int], wrong: int, limit: int) -> None:
        """Prompts come and go, of which cached blocks remain; then the first one is wanted again."""
        size, num_groups = self.manager.block_size, len(self.manager.windows)
        counts = [min(count, self.manager.num_free // num_groups * size) for count in counts]
        for number, count in enumerate(counts):
            row = self._new(root)
            self._forward([row], [(count, wrong + number)])
            self.manager.release(row.sequence)
        self.start_from_prefix(root, counts[0], wrong, limit)

    @invariant()
    def host_memory_holds_what_the_index_says(self) -> None:
        host, index = self.manager.host, self.manager.index
        for host_block, (node, group) in host._places.items():
            assert self.storage.host_slots[host_block] == self._content(node, group)
        for block, (node, group) in index._places.items():
            assert self.storage.slots[block] == self._content(node, group)
        for host_block in host._free:
            assert set(self.storage.host_slots[host_block]) == {POISON}

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "manager"):
            assert len(self.manager.host) == 0
            assert not list(self.manager.index.nodes())
            for name in totals:
                totals[name] += getattr(self.manager.host.counters, name)

    def _content(self, node: PrefixNode, group: int) -> list:
        root, *tokens = path(node)
        size = self.manager.block_size
        return [(group, (root, tuple(tokens[: i + 1]))) for i in range(len(tokens) - size, len(tokens))]

    def _longest_prefix(self, root: str | None, tokens: list[int], limit: int) -> int:
        manager, size, may_restore = self.manager, self.manager.block_size, True
        blocks = {(path(node), group): block for block, (node, group) in manager.index._places.items()}
        on_host = {(path(node), group) for node, group in manager.host._places.values()}
        for length in range(limit, 0, -1):
            end = -(-length // size)
            if len(tokens) < end * size:
                continue
            seen = [
                ((root, *tokens[: (i + 1) * size]), group)
                for group in range(len(manager.windows))
                for i in range(self._first_seen(group, length), end)
            ]
            missing = [place for place in seen if place not in blocks]
            if not missing:
                return length
            if may_restore and on_host.issuperset(missing):
                idle = sum(manager.allocator.ref_count(blocks[place]) == 0 for place in seen if place in blocks)
                if idle + len(missing) <= manager.num_free:
                    if self.verdict.restoring:
                        return length
                    may_restore = False
        return 0

    def _snapshot(self) -> tuple:
        host = self.manager.host
        places = {host_block: (id(node), group) for host_block, (node, group) in host._places.items()}
        return (*super()._snapshot(), places, list(host._free), vars(host.counters).copy())


class TestOffloadingPool(OffloadingPool.TestCase):
    """Many runs, in which blocks really came and went."""

    settings = settings(max_examples=300, stateful_step_count=40, deadline=None)

    def runTest(self) -> None:  # noqa: N802
        super().runTest()
        assert all(totals.values()), totals
