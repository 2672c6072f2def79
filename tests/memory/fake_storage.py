"""A storage that remembers what each slot stands for, and rows as plain lists: what the bookkeeping is measured against."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from paged_cache.memory.growth import SKIP, Growth
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.sequence import HOLE, Sequence
from paged_cache.memory.taking import Writes

POISON = "given back"


@dataclass
class Row:
    """A sequence and what a naive cache would hold for it.

    Attributes:
        root: Stands for all that K and V depend on besides the tokens.
        tokens: All ids, those of an open step included.
        contents: What each token's slot has to hold: the root and all ids up to this one.
        floor: Shortest length it can be cut to: blocks behind windows are gone for good.
        computed: Tokens that are really in the storage.
    """

    sequence: Sequence
    root: Hashable
    tokens: list[int] = field(default_factory=list)
    contents: list[Hashable] = field(default_factory=list)
    floor: int = 0
    computed: int = 0

    def copy(self, sequence: Sequence) -> "Row":
        """The same content under another sequence."""
        return Row(sequence, self.root, list(self.tokens), list(self.contents), self.floor, self.computed)

    def append(self, tokens: list[int]) -> None:
        """Adds tokens as the model will compute them."""
        for token in tokens:
            self.tokens.append(token)
            self.contents.append((self.root, tuple(self.tokens)))

    def cut(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` tokens."""
        del self.tokens[num_tokens:], self.contents[num_tokens:]
        self.computed = min(self.computed, num_tokens)


@dataclass
class Slots:
    """One forward's new tokens and where they go."""

    rows: list[Row]
    starts: list[int]
    writes: Writes


class FakeStorage:
    """`slots[block][offset]` is (group, content) of the token there, or `POISON` while nobody owns the block.

    `host_slots` is the same for blocks in host memory.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.slots: list[list[Hashable]] = []
        for _ in range(manager.allocator.num_blocks):
            self.slots.append([POISON] * manager.block_size)
        self.host_slots: list[list[Hashable]] = []
        for _ in range(manager.host.num_blocks):
            self.host_slots.append([POISON] * manager.block_size)
        manager.on_free = self.poison
        manager.on_copy = self.copy
        manager.host.on_free = self.poison_host
        manager.host.on_save = self.save
        manager.host.on_load = self.load

    def poison(self, blocks: list[int]) -> None:
        """Overwrites blocks that went back to the pool."""
        for block in blocks:
            self.slots[block] = [POISON] * self.manager.block_size

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, all at once."""
        assert len({destination for _, destination in pairs}) == len(pairs)
        sources = [list(self.slots[source]) for source, _ in pairs]
        for (_, destination), content in zip(pairs, sources, strict=True):
            self.slots[destination] = content

    def poison_host(self, host_blocks: list[int]) -> None:
        """Overwrites host blocks that became free."""
        for host_block in host_blocks:
            self.host_slots[host_block] = [POISON] * self.manager.block_size

    def save(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks to host memory, into host blocks that hold nothing."""
        assert pairs
        assert len({host_block for _, host_block in pairs}) == len(pairs)
        for block, host_block in pairs:
            assert POISON not in self.slots[block], "a block left the pool before it was saved"
            assert set(self.host_slots[host_block]) == {POISON}
            self.host_slots[host_block] = list(self.slots[block])

    def load(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks back, into blocks that hold nothing."""
        assert len({block for _, block in pairs}) == len(pairs)
        for host_block, block in pairs:
            assert POISON not in self.host_slots[host_block], "a host block was given up before it was loaded"
            assert set(self.slots[block]) == {POISON}
            self.slots[block] = list(self.host_slots[host_block])

    def extend(self, rows: list[Row], tokens: list[list[int]], known: list[bool] | None = None) -> Slots:
        """Makes room, as a forward does before its first layer."""
        known = known or [True] * len(rows)
        growths = [
            Growth(row.sequence, len(ids), ids if is_known else None)
            for row, ids, is_known in zip(rows, tokens, known, strict=True)
        ]
        writes = self.manager.extend(growths)
        starts = [len(row.tokens) for row in rows]
        for row, ids in zip(rows, tokens, strict=True):
            row.append(ids)
        return Slots(rows, starts, writes)

    def append(self, rows: list[Row], tokens: list[list[int]]) -> Slots:
        """Makes room for one token each, as a decoding step does."""
        slots = self.manager.append([row.sequence for row in rows], [token for (token,) in tokens])
        starts = [len(row.tokens) for row in rows]
        for row, ids in zip(rows, tokens, strict=True):
            row.append(ids)
        return Slots(rows, starts, Writes(slots=[[[slot] for slot in group] for group in slots]))

    def write(self, step: Slots) -> None:
        """Fills the slots of a step, as its layers do."""
        size, seen = self.manager.block_size, set()
        for group, rows in enumerate(step.writes.slots):
            for row, start, slots in zip(step.rows, step.starts, rows, strict=True):
                assert len(slots) == len(row.tokens) - start
                for content, slot in zip(row.contents[start:], slots, strict=True):
                    if slot != SKIP:
                        assert slot not in seen, "two tokens of one forward go to one slot"
                        seen.add(slot)
                        self.slots[slot // size][slot % size] = (group, content)
        for row in step.rows:
            row.computed = len(row.tokens)

    def commit(self, step: Slots, keep_past: bool = False) -> None:
        """The forward returned."""
        if not keep_past:
            self.manager.commit_all([row.sequence for row in step.rows])
        for row in step.rows:
            if keep_past:
                self.manager.commit(row.sequence, keep_past)
            row.floor = row.floor if keep_past else len(row.tokens)

    def abort(self, step: Slots) -> None:
        """The forward failed: its tokens are taken back."""
        for row, start in zip(step.rows, step.starts, strict=True):
            self.manager.truncate(row.sequence, start)
            row.cut(start)

    def forward(self, rows: list[Row], tokens: list[list[int]], keep_past: bool = False) -> Slots:
        """A whole step: room, writes, commit."""
        step = self.extend(rows, tokens)
        self.write(step)
        self.commit(step, keep_past)
        return step

    def check(self, rows: list[Row]) -> None:
        """Everything that the next token of each row sees is exactly what a naive cache holds."""
        for row in rows:
            assert row.sequence.num_tokens == len(row.tokens)
            for group, table in enumerate(row.sequence.tables):
                self._check_table(row, group, table)

    def _check_table(self, row: Row, group: int, table: list[int]) -> None:
        size, window = self.manager.block_size, self.manager.windows[group]
        length = row.computed
        first = 0 if window is None else max(length - window + 1, 0)
        if row.floor == len(row.tokens):
            assert set(table[: first // size]) <= {HOLE}, "a block that nobody sees is still held"
        for i in range(first, length):
            block = table[i // size]
            assert block != HOLE
            assert self.slots[block][i % size] == (group, row.contents[i]), (group, i, table)


def new_row(manager: BlockManager, root: Hashable = "root") -> Row:
    """An empty row that takes part in sharing."""
    return Row(manager.new_sequence(root), root)
