"""Any order of operations on a small pool, against rows that are plain lists."""

import itertools

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_cache.errors import OutOfBlocksError
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.prefix import PrefixNode
from tests.memory.fake_storage import POISON, FakeStorage, Row, Slots

MAX_ROWS = 8
ROOTS = ("a", "a", "a", "b", None)
STORY = (-1, -2, -2, -1, -1, -2, -1)  # what most rows say again and again, so that they meet; two ids with one hash

picks = st.integers(0, 10**6)  # taken modulo what there is
counts = st.sampled_from((0, 1, 1, 1, 2, 3, 4, 5, 9))
wrong_tokens = st.sampled_from((None, None, 0, 0, 1, 2, 3, 5))  # which of the new tokens differs from the story
rows_of_step = st.lists(picks, min_size=1, max_size=4)
growths = st.lists(st.tuples(counts, wrong_tokens), min_size=4, max_size=4)
knowns = st.sampled_from((True, True, True, True, False))  # whether the first row's ids are


Growths = list[tuple[int, int | None]]  # how many tokens, and which of them differs


def pick(items: list, numbers: list[int]) -> list:
    """Different items, as many as numbers if there are so many."""
    left = list(items)
    return [left.pop(number % len(left)) for number in numbers[: len(items)]]


def path(node: PrefixNode) -> tuple:
    """Root key and all token ids that a node stands for."""
    if node.parent is None:
        return (node.key,)
    return (*path(node.parent), *node.tokens)


def tell(start: int, count: int, wrong: int | None) -> list[int]:
    """The next tokens of the story from `start` on, but for the one numbered `wrong`."""
    tokens = [STORY[i % len(STORY)] for i in range(start, start + count)]
    if wrong is not None and wrong < count:
        tokens[wrong] = -3 - tokens[wrong]
    return tokens


class Pool(RuleBasedStateMachine):
    """Rows that share a pool, with forwards that may stay open while others go on."""

    @initialize(
        num_blocks=st.integers(4, 32),
        block_size=st.sampled_from((1, 2, 2, 4)),
        windows=st.sampled_from(((None,), (None,), (None, None), (None, 6), (5,), (2,), (None, 3, 1))),
        prefix_caching=st.sampled_from((True, True, True, True, False)),
    )
    def start_pool(self, num_blocks: int, block_size: int, windows: tuple, prefix_caching: bool) -> None:
        self._start(BlockManager(num_blocks * len(windows), block_size, windows, prefix_caching))

    def _start(self, manager: BlockManager) -> None:
        self.manager = manager
        self.storage = FakeStorage(self.manager)
        self.private = itertools.count()
        self.rows = [self._new("a"), self._new("a")]
        self.steps: list[tuple[Slots, bool]] = []  # open ones, and whether their slots are still to be written

    # Rows of open steps can be given back, nothing else; see PagedState.settle.

    @property
    def closed(self) -> list[Row]:
        opened = [id(row) for step, _ in self.steps for row in step.rows]
        return [row for row in self.rows if id(row) not in opened]

    def has_room(self) -> bool:
        return len(self.rows) < MAX_ROWS

    def has_closed(self) -> bool:
        return bool(self.closed)

    @precondition(has_room)
    @rule(root=st.sampled_from(ROOTS))
    def new(self, root: str | None) -> None:
        self.rows.append(self._new(root))

    @precondition(has_room)
    @rule(root=st.sampled_from(ROOTS), count=st.integers(0, 20), wrong=wrong_tokens, limit=st.integers(0, 20))
    def start_from_prefix(self, root: str | None, count: int, wrong: int | None, limit: int) -> None:
        row = self._new(root)
        tokens, limit = tell(0, count, wrong), min(limit, count)
        found = self.manager.match(row.sequence, tokens, limit)
        assert found == self._longest_prefix(root, tokens, limit)
        self.manager.take_prefix(row.sequence, tokens, found)
        row.append(tokens[:found])
        row.floor = row.computed = found
        self.rows.append(row)

    @precondition(has_closed)
    @rule(numbers=rows_of_step, growths=growths, known=knowns, late=st.booleans())
    def begin(self, numbers: list[int], growths: Growths, known: bool, late: bool) -> None:
        """A forward that stays open while other things happen."""
        step = self._extend(pick(self.closed, numbers), growths, known)
        if step is not None:
            self.steps.append((step, late))
            if not late:
                self.storage.write(step)

    @precondition(has_closed)
    @rule(numbers=rows_of_step, growths=growths, known=knowns, keep_past=st.booleans())
    def forward(self, numbers: list[int], growths: Growths, known: bool, keep_past: bool) -> None:
        self._forward(pick(self.closed, numbers), growths, known, keep_past)

    @precondition(has_closed)
    @rule(numbers=rows_of_step, count=counts, one_by_one=st.booleans())
    def forward_alike(self, numbers: list[int], count: int, one_by_one: bool) -> None:
        """Rows that say the same, at once or token by token."""
        rows = pick(self.closed, numbers)
        for tokens in [1] * count if one_by_one else [count]:
            self._forward(rows, [(tokens, None)] * len(rows))

    @precondition(has_closed)
    @rule(numbers=rows_of_step, wrong=wrong_tokens, count=counts)
    def decode(self, numbers: list[int], wrong: int | None, count: int) -> None:
        """A few tokens, one by one; the first may differ from what is expected."""
        rows = pick(self.closed, numbers)
        for i in range(count):
            self._forward(rows, [(1, None if i else wrong)] * len(rows), is_quick=True)

    @precondition(lambda self: self.steps)
    @rule(number=picks, keep_past=st.booleans())
    def finish(self, number: int, keep_past: bool) -> None:
        step, late = self.steps.pop(number % len(self.steps))
        if late:
            self.storage.write(step)
        self.storage.commit(step, keep_past)

    @precondition(lambda self: self.steps)
    @rule(number=picks)
    def abort(self, number: int) -> None:
        step, _ = self.steps.pop(number % len(self.steps))
        self.storage.abort(step)

    @precondition(lambda self: self.has_room() and self.has_closed())
    @rule(number=picks, growths=growths)
    def fork(self, number: int, growths: Growths) -> None:
        """Both go on."""
        (row,) = pick(self.closed, [number])
        self.rows.append(row.copy(self.manager.fork(row.sequence)))
        self._forward([row, self.rows[-1]], growths)

    @precondition(has_closed)
    @rule(numbers=rows_of_step, indices=st.lists(st.integers(-4, 3), max_size=4))
    def select(self, numbers: list[int], indices: list[int]) -> None:
        rows = pick(self.closed, numbers)
        indices = [i for i in indices if -len(rows) <= i < len(rows)]
        sequences = self.manager.select([row.sequence for row in rows], indices)
        assert len({id(sequence) for sequence in sequences}) == len(indices)
        self.rows = [row for row in self.rows if row not in rows]
        self.rows += [rows[i].copy(sequence) for i, sequence in zip(indices, sequences, strict=True)]

    @precondition(has_closed)
    @rule(number=picks, num_tokens=st.integers(0, 5), growth=st.tuples(counts, wrong_tokens), is_alone=st.booleans())
    def crop(self, number: int, num_tokens: int, growth: tuple[int, int | None], is_alone: bool) -> None:
        """The row goes on, alone or beside a new one that says what it said."""
        (row,) = pick(self.closed, [number])
        floor = row.floor if any(self.manager.windows) else 0
        row.cut(max(len(row.tokens) - num_tokens, floor))
        self.manager.truncate(row.sequence, len(row.tokens))
        self.manager.commit(row.sequence)
        row.floor = len(row.tokens)
        if is_alone or not self.has_room():
            self._forward([row], [growth])
        else:
            self.rows.append(self._new(row.root if row.root in ROOTS else None))
            self._forward([row, self.rows[-1]], [growth, (9, None)])

    @precondition(lambda self: self.rows)
    @rule(number=picks, in_finalizer=st.booleans())
    def give_back(self, number: int, in_finalizer: bool) -> None:
        """A row, or all rows of an open step, which wait for each other's blocks."""
        row = self.rows[number % len(self.rows)]
        steps = [(step, late) for step, late in self.steps if any(row is other for other in step.rows)]
        given = steps[0][0].rows if steps else [row]
        self.steps = [entry for entry in self.steps if entry not in steps]
        self.rows = [row for row in self.rows if not any(row is other for other in given)]
        if in_finalizer:
            self.manager.abandon(row.sequence for row in given)
            return
        for row in [*given, *given]:
            self.manager.release(row.sequence)

    @rule(share=st.integers(1, 4))
    def press(self, share: int) -> None:
        """Another user of the pool takes a part of what is free, and goes."""
        row = self._new(None)
        num_blocks = self.manager.num_free * share // 4 // len(self.manager.windows)
        step = self.storage.extend([row], [[7] * (num_blocks * self.manager.block_size)])
        self.storage.write(step)
        self.storage.commit(step)
        self.storage.check([row])
        self.manager.release(row.sequence)

    @rule(really=st.sampled_from((False, False, False, True)))
    def clear_prefix_cache(self, really: bool) -> None:
        if not really:  # often, and there would be nothing to find for the other rules
            return
        self.manager.clear_prefix_cache()
        assert not self.manager.num_cached
        for row in self.rows:
            self._make_private(row, len(row.tokens))

    @invariant()
    def holds_what_a_naive_cache_holds(self) -> None:
        self.manager.check()
        self.storage.check(self.rows)
        for block in self.manager.allocator._free:
            assert set(self.storage.slots[block]) == {POISON}

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for row in self.rows:
            self.manager.release(row.sequence)
        self.manager.check()
        assert self.manager.num_free == self.manager.allocator.num_blocks
        self.manager.clear_prefix_cache()
        assert len(self.manager.index) == self.manager.num_cached == 0

    def _new(self, root: str | None) -> Row:
        row = Row(self.manager.new_sequence(root), root)
        if root is None:
            self._make_private(row, 0)
        return row

    def _forward(
        self, rows: list[Row], growths: Growths, known: bool = True, keep_past: bool = False, is_quick: bool = False
    ) -> None:
        step = self._extend(rows, growths, known, is_quick)
        if step is not None:
            self.storage.write(step)
            self.storage.commit(step, keep_past)

    def _extend(self, rows: list[Row], growths: Growths, known: bool, is_quick: bool = False) -> Slots | None:
        tokens = [tell(len(row.tokens), count, wrong) for row, (count, wrong) in zip(rows, growths, strict=False)]
        self.manager.check()  # takes abandoned rows back, which is no part of the step
        before = self._snapshot()
        try:
            if is_quick:
                return self.storage.append(rows, tokens)
            step = self.storage.extend(rows, tokens, [known, *[True] * (len(rows) - 1)])
        except OutOfBlocksError:
            assert self._snapshot() == before
            return None
        if not known and tokens[0]:
            self._make_private(rows[0], step.starts[0])
        return step

    def _make_private(self, row: Row, start: int) -> None:
        """What comes from `start` on can be shared with nobody but forks."""
        row.root = ("private", next(self.private))
        ids, computed = row.tokens[start:], row.computed
        row.cut(start)
        row.append(ids)
        row.computed = computed

    def _longest_prefix(self, root: str | None, tokens: list[int], limit: int) -> int:
        manager, size = self.manager, self.manager.block_size
        known = {(path(node), group) for node, group in manager.index._places.values()}
        for length in range(limit, 0, -1):
            end = -(-length // size)
            seen = [(g, i) for g in range(len(manager.windows)) for i in range(self._first_seen(g, length), end)]
            if len(tokens) >= end * size and all(((root, *tokens[: (i + 1) * size]), g) in known for g, i in seen):
                return length
        return 0

    def _first_seen(self, group: int, length: int) -> int:
        window = self.manager.windows[group]
        return 0 if window is None else max(length - window + 1, 0) // self.manager.block_size

    def _snapshot(self) -> tuple:
        manager, allocator = self.manager, self.manager.allocator
        sequences = [
            (id(s), [list(t) for t in s.tables], s.num_tokens, id(s.node), list(s.tail), list(s.fresh), s.version)
            for s in manager._registry.live()
        ]
        states = (list(allocator._ref_counts), list(allocator._free), list(allocator._cached), set(allocator._indexed))
        places = {block: (id(node), group) for block, (node, group) in manager.index._places.items()}
        return sequences, states, places, vars(allocator.counters).copy(), vars(manager.counters).copy()


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=500, stateful_step_count=40, deadline=None)
