"""All bookkeeping of a pool: sequences, their blocks and the prefix index. Plain Python."""

import threading
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from ..errors import OutOfBlocksError
from .allocator import BlockAllocator
from .growth import SKIP, Growth, GrowthPlanner, RowPlan, Source, Writes
from .prefix import PrefixIndex, PrefixNode
from .sequence import HOLE, Sequence

@dataclass
class ManagerCounters:
    """Events over the manager's lifetime; prefix counters are in tokens."""

    cow_copies: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class BlockManager:
    """Grows, forks, cuts and releases sequences. The only user of `BlockAllocator` and `PrefixIndex`.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens per block.
        windows: Per layer group how many tokens, the newest included, attention can see; None for all.
        prefix_caching: Whether blocks stay findable by their tokens.
    """

    def __init__(
        self, num_blocks: int, block_size: int, windows: Iterable[int | None], prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self.windows = tuple(windows)
        self._groups = range(len(self.windows))
        self.prefix_caching = prefix_caching
        self.counters = ManagerCounters()
        self.index = PrefixIndex(len(self.windows))
        self.allocator = BlockAllocator(num_blocks, self._forget)
        self._planner = GrowthPlanner(self.allocator, block_size)
        self._sequences: dict[int, Sequence] = {}
        self._abandoned: deque[Sequence] = deque()
        self._lock = threading.RLock()
        self.on_free = lambda blocks: None  # tests poison freed blocks here

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        with self._lock:
            self._drain()
            return self.allocator.num_free

    @property
    def num_cached(self) -> int:
        """Blocks without a reference that still hold a reusable prefix."""
        with self._lock:
            self._drain()
            return self.allocator.num_cached

    def new_sequence(self, root_key: Hashable | None = None) -> Sequence:
        """An empty sequence. With a `root_key` (all that K and V depend on besides tokens) it takes part in sharing."""
        with self._lock:
            root = self.index.root(root_key) if root_key is not None and self.prefix_caching else None
            return self._adopt(Sequence(len(self.windows), root))

    def match(self, sequence: Sequence, tokens: list[int], limit: int) -> int:
        """How many of the first `limit` tokens an empty sequence can take from the pool."""
        with self._lock:
            if sequence.node is None:
                return 0
            nodes = self.index.match(sequence.node, tokens, self.block_size)
            return self._usable(nodes, min(limit, len(nodes) * self.block_size))

    def take_prefix(self, sequence: Sequence, tokens: list[int], num_tokens: int) -> None:
        """Gives an empty sequence the blocks of its first `num_tokens` tokens, as found by `match`."""
        with self._lock:
            size = self.block_size
            nodes = self.index.match(sequence.node, tokens, size)[: -(-num_tokens // size)]
            for group, table in enumerate(sequence.tables):
                first = self._first_visible_block(group, num_tokens)
                table.extend(HOLE if i < first else _block(node, group) for i, node in enumerate(nodes))
                self.allocator.acquire(block for block in table if block != HOLE)
            num_full = num_tokens // size
            sequence.node = nodes[num_full - 1] if num_full else sequence.node
            sequence.tail = list(tokens[num_full * size : num_tokens])
            sequence.num_tokens = num_tokens
            sequence.version += 1

    def extend(self, growths: list[Growth]) -> Writes:
        """Makes room for new tokens, all or nothing.

        Raises:
            OutOfBlocksError: Too few blocks; nothing was changed.
        """
        with self._lock:
            self._drain()
            plans = self._planner.plan(growths)
            needed = self._planner.num_needed(growths, plans)
            if not self.allocator.can_allocate(needed):
                raise OutOfBlocksError(needed, self.allocator.num_free)
            self._acquire_hits(plans)
            writes = Writes(slots=[[] for _ in self.windows])
            for growth, plan in zip(growths, plans, strict=True):
                self._grow(growth, plan, growths, writes)
            return writes

    def commit(self, sequence: Sequence, keep_past: bool = False) -> None:
        """The tokens of the open step are computed: full blocks enter the prefix index, and blocks behind a window go
        back to the pool unless `keep_past`."""
        with self._lock:
            sequence.tail += sequence.fresh
            sequence.fresh = []
            while sequence.node is not None and len(sequence.tail) >= self.block_size:
                self._register(sequence)
            if not keep_past:
                self._trim(sequence)

    def can_truncate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether all blocks are still there that the token behind the first `num_tokens` sees."""
        keep = -(-num_tokens // self.block_size)
        firsts = [self._first_visible_block(group, num_tokens) for group in self._groups]
        return all(HOLE not in table[first:keep] for table, first in zip(sequence.tables, firsts, strict=True))

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Cuts a sequence to its first `num_tokens` tokens; also takes an open step back."""
        with self._lock:
            keep = -(-num_tokens // self.block_size)
            for table in sequence.tables:
                self._release(block for block in reversed(table[keep:]) if block != HOLE)
                del table[keep:]
            if sequence.node is not None:
                tail, node = sequence.tail, sequence.node
                while node.depth * self.block_size > num_tokens:
                    assert node.parent is not None
                    tail, node = list(node.tokens), node.parent
                sequence.tail, sequence.node = tail[: num_tokens - node.depth * self.block_size], node
            sequence.fresh = []
            sequence.num_tokens = num_tokens
            sequence.version += 1

    def fork(self, sequence: Sequence) -> Sequence:
        """Another sequence on the same blocks."""
        with self._lock:
            self.allocator.acquire(sequence.blocks())
            return self._adopt(sequence.copy())

    def select(self, sequences: list[Sequence], indices: list[int]) -> list[Sequence]:
        """Row `i` of the result is sequence `indices[i]`: moved, forked where it is named twice, released where never."""
        with self._lock:
            taken: set[int] = set()
            rows = []
            for i in indices:
                rows.append(self.fork(sequences[i]) if i in taken else sequences[i])
                taken.add(i)
            for i, sequence in enumerate(sequences):
                if i not in taken:
                    self.release(sequence)
            return rows

    def release(self, sequence: Sequence) -> None:
        """Gives all blocks of a sequence back. Releasing twice does nothing."""
        with self._lock:
            if self._sequences.pop(id(sequence), None) is None:
                return
            blocks = sequence.blocks()
            sequence.tables = [[] for _ in self.windows]
            sequence.num_tokens = 0
            sequence.forget_tokens()
            self._release(blocks)

    def abandon(self, sequences: Iterable[Sequence]) -> None:
        """Like `release`, but later: safe in finalizers, which may run at any point of any thread."""
        self._abandoned.extend(sequences)

    def clear_prefix_cache(self) -> None:
        """Forgets all prefixes; sequences in use keep their blocks but no longer share new ones."""
        with self._lock:
            self._drain()
            for block in self.index.blocks():
                self._forget(block)
            for sequence in self._sequences.values():
                sequence.forget_tokens()
            self.index.drop_unused_roots()

    def check(self) -> None:
        """Raises `PagedCacheError` if any invariant of the bookkeeping is broken."""
        with self._lock:
            self._drain()
            live = list(self._sequences.values())
            self.allocator.check([s.blocks() for s in live])
            self.index.check({b for b in range(self.allocator.num_blocks) if self.allocator.is_indexed(b)})
            for sequence in live:
                sequence.check(self.block_size, [self._first_visible_block(g, sequence.num_tokens) for g in self._groups])

    def _adopt(self, sequence: Sequence) -> Sequence:
        self._sequences[id(sequence)] = sequence
        return sequence

    def _drain(self) -> None:
        while self._abandoned:
            self.release(self._abandoned.popleft())

    def _forget(self, block: int) -> None:
        was_referenced = self.allocator.ref_count(block) > 0
        self.index.remove(block)
        self.allocator.unmark_indexed(block)
        if not was_referenced:
            self.on_free([block])

    def _release(self, blocks: Iterable[int]) -> None:
        self.on_free(self.allocator.release(blocks))

    def _first_visible_block(self, group: int, num_tokens: int) -> int:
        """First block that the next token can see."""
        window = self.windows[group]
        return 0 if window is None else max(num_tokens - window + 1, 0) // self.block_size

    def _usable(self, nodes: list[PrefixNode], num_tokens: int) -> int:
        for group in self._groups:
            num_blocks = -(-num_tokens // self.block_size)
            for i in range(num_blocks - 1, -1, -1):
                if i < self._first_visible_block(group, num_tokens):
                    break
                if nodes[i].blocks[group] is None:
                    return self._usable(nodes, i * self.block_size)
        return num_tokens

    def _acquire_hits(self, plans: list[RowPlan]) -> None:
        for plan in plans:
            for source in plan.sources:
                if isinstance(source, PrefixNode):
                    self.allocator.acquire(_block(source, group) for group in self._groups)

    def _grow(self, growth: Growth, plan: RowPlan, growths: list[Growth], writes: Writes) -> None:
        sequence = growth.sequence
        first_block = sequence.num_tokens // self.block_size
        if self._planner.writes_partial(growth, plan):
            self._make_writable(sequence, writes)
        held = {first_block} if plan.keeps_partial else set()
        for source in plan.sources:
            if source is not None:
                held.add(len(sequence.tables[0]))
            self._append_block(sequence, source, growths)
        for group, table in enumerate(sequence.tables):
            writes.slots[group].append(self._slots(table, sequence.num_tokens, growth.num_tokens, held))
        sequence.num_tokens += growth.num_tokens
        if growth.tokens is None and growth.num_tokens:
            sequence.forget_tokens()
        elif sequence.node is not None and growth.tokens:
            sequence.fresh = list(growth.tokens)

    def _append_block(self, sequence: Sequence, source: Source, growths: list[Growth]) -> None:
        sequence.version += 1
        for group, table in enumerate(sequence.tables):
            if isinstance(source, PrefixNode):
                table.append(_block(source, group))
            elif source is not None:
                row, index = source
                block = growths[row].sequence.tables[group][index]
                self.allocator.acquire([block])
                table.append(block)
            else:
                table.extend(self.allocator.allocate(1))

    def _make_writable(self, sequence: Sequence, writes: Writes) -> None:
        """Copy-on-write of the partly filled last block; one that only the prefix index shares leaves the index."""
        for table in sequence.tables:
            block = table[-1]
            if self.allocator.ref_count(block) > 1:
                table[-1] = self.allocator.allocate(1)[0]
                self.allocator.release([block])
                writes.copies.append((block, table[-1]))
                self.counters.cow_copies += 1
                sequence.version += 1
            elif self.allocator.is_indexed(block):
                self._forget(block)

    def _slots(self, table: list[int], start: int, count: int, held: set[int]) -> list[int]:
        size, slots = self.block_size, []
        for i in range(start // size, -(-(start + count) // size)):
            first, last = max(start - i * size, 0), min(start + count - i * size, size)
            base = table[i] * size
            slots += [SKIP] * (last - first) if i in held else range(base + first, base + last)
        return slots

    def _register(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        tokens = tuple(sequence.tail[: self.block_size])
        index = sequence.node.depth
        node = self.index.insert(sequence.node, tokens)
        for group, table in enumerate(sequence.tables):
            mine, known = table[index], node.blocks[group]
            if mine == HOLE or mine == known:
                continue
            if known is not None:  # computed twice: one of them is enough
                self.allocator.acquire([known])
                table[index] = known
                sequence.version += 1
                self._release([mine])
            elif not self.allocator.is_indexed(mine):
                self.index.put(node, group, mine)
                self.allocator.mark_indexed(mine)
        sequence.node, sequence.tail = node, sequence.tail[self.block_size :]

    def _trim(self, sequence: Sequence) -> None:
        for group, table in enumerate(sequence.tables):
            i = self._first_visible_block(group, sequence.num_tokens) - 1
            passed = []
            while i >= 0 and table[i] != HOLE:
                passed.append(table[i])
                table[i] = HOLE
                i -= 1
            if passed:
                sequence.version += 1
                self._release(passed)


def _block(node: PrefixNode, group: int) -> int:
    block = node.blocks[group]
    assert block is not None
    return block
