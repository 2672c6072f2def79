"""All bookkeeping of a pool: sequences, their blocks and the prefix index. Plain Python."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable

from ..errors import OutOfBlocksError
from .allocator import BlockAllocator, ManagerCounters
from .appending import append_in_place, has_room
from .exclusive import exclusive
from .growth import Growth, GrowthPlanner
from .offload import HostTier
from .offload_costs import OffloadCosts
from .prefix import PrefixIndex
from .registering import register
from .registry import Registry
from .sequence import HOLE, Sequence
from .starting import Start, Starter
from .taking import BlockTaker, End, Writes
from .windows import Windows

EVICTED_TOGETHER = 32
"""Blocks that go to host memory in one copy, where the pool is large enough: a copy of one takes nearly as long."""


class BlockManager:
    """Grows, forks, cuts and releases sequences. The only user of `BlockAllocator` and `PrefixIndex`.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens per block.
        windows: Per layer group how many tokens, the newest included, attention can see; None for all.
        prefix_caching: Whether blocks stay findable by their tokens.
        num_host_blocks: Blocks in host memory for the content of those that the pool evicts.

    Attributes:
        host: The tier of blocks in host memory.
        lock: Held by every method; hold it around calls that belong together, such as `match` and `take_prefix`.
        on_copy: Called with (source, destination) blocks to copy, before any table has a destination.
        on_free: Called with blocks that became free: tests poison them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: Iterable[int | None],
        prefix_caching: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.windows = tuple(windows)
        self._visibility = Windows(self.windows, block_size)
        self._has_windows = any(window is not None for window in self.windows)
        self.prefix_caching = prefix_caching
        self.counters = ManagerCounters()
        self.index = PrefixIndex(len(self.windows))
        self.host = HostTier(num_host_blocks, self.index, OffloadCosts(block_size / max(len(self.windows), 1)))
        self.allocator = BlockAllocator(num_blocks, self._evict)
        self.allocator.evict_ahead = min(EVICTED_TOGETHER, num_blocks // 16) if num_host_blocks else 0
        self._planner = GrowthPlanner(self.allocator, block_size)
        self._taker = BlockTaker(self.allocator, block_size, self._forget)
        self._starter = Starter(self.allocator, self.index, self.host, self._visibility, block_size)
        self._registry = Registry()
        self._abandoned: deque[Sequence] = deque()
        self.lock = threading.RLock()
        self.on_copy: Callable[[list[tuple[int, int]]], None] = lambda pairs: None
        self.on_free: Callable[[list[int]], None] = lambda blocks: None

    @property
    @exclusive
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        self._drain()
        return self.allocator.num_free

    @property
    @exclusive
    def num_cached(self) -> int:
        """Blocks without a reference that still hold a reusable prefix."""
        self._drain()
        return self.allocator.num_cached

    @exclusive
    def new_sequence(self, root_key: Hashable | None = None) -> Sequence:
        """An empty sequence. With a `root_key` (all that K and V depend on besides tokens) it takes part in sharing."""
        root = self.index.root(root_key) if root_key is not None and self.prefix_caching else None
        return self._adopt(Sequence(len(self.windows), root))

    @exclusive
    def match(self, sequence: Sequence, tokens: list[int], limit: int, from_host: bool = True) -> int:
        """How many of the first `limit` tokens an empty sequence can take; `from_host`: also from host memory, if that pays."""
        return self._starter.match(sequence, tokens, limit, from_host)

    @exclusive
    def num_needed(self, starts: list[Start]) -> int:
        """Free blocks that `take_prefixes` would take: cached ones, and one for each that is in host memory only."""
        return self._starter.needs(starts).num_free

    @exclusive
    def take_prefix(self, sequence: Sequence, tokens: list[int], num_tokens: int) -> None:
        """Gives an empty sequence the blocks of its first `num_tokens` tokens, as found by `match`."""
        self._starter.take([Start(sequence, tokens, num_tokens)])

    @exclusive
    def take_prefixes(self, starts: list[Start]) -> None:
        """`take_prefix` of many; blocks in host memory are brought back together.

        Raises:
            OutOfBlocksError: There is no room for these (see `num_needed`); nothing was changed.
        """
        self._starter.take(starts)

    @exclusive
    def extend(self, growths: list[Growth]) -> Writes:
        """Makes room for new tokens, all or nothing.

        Raises:
            OutOfBlocksError: Too few blocks; nothing was changed.
        """
        self._drain()
        plan = self._planner.plan(growths)
        needed = plan.num_new + plan.num_cached
        if not self.allocator.can_allocate(needed):
            raise OutOfBlocksError(needed, self.allocator.num_free)
        ends, writes = self._taker.take(growths, plan)
        self.on_copy(writes.copies)
        self.counters.cow_copies += len(writes.copies)
        lengths = [growth.sequence.num_tokens for growth in growths]
        try:
            for growth, end in zip(growths, ends, strict=True):
                self._append(growth, end)
        except BaseException:
            for growth, length in zip(growths, lengths, strict=True):
                growth.sequence.num_tokens = length
            raise
        if self.host.num_blocks:
            self.host.begin_step(growths)
        return writes

    @exclusive
    def append(self, sequences: list[Sequence], tokens: list[int]) -> list[list[int]]:
        """`extend` by one known token each, quick where a block has room: `slots[group][i]` of sequence `i`."""
        slow = [i for i, sequence in enumerate(sequences) if not has_room(sequence, self.allocator, self.block_size)]
        rows = self.extend([Growth(sequences[i], 1, [tokens[i]]) for i in slow]).slots if slow else []
        placed = {i: [row[k][0] for row in rows] for k, i in enumerate(slow)}
        slots: list[list[int]] = [[] for _ in self.windows]
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            own = placed[i] if i in placed else append_in_place(sequence, token, self.block_size)
            for group, slot in zip(slots, own, strict=True):
                group.append(slot)
        return slots

    @exclusive
    def commit_all(self, sequences: list[Sequence]) -> None:
        """`commit` of many."""
        for sequence in sequences:
            self._commit(sequence)

    @exclusive
    def commit(self, sequence: Sequence, keep_past: bool = False) -> None:
        """The tokens of the open step are computed.

        Full blocks enter the prefix index; blocks behind a window go back to the pool unless `keep_past`.
        """
        self._commit(sequence, keep_past)

    def can_truncate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether all blocks are still there that the token behind the first `num_tokens` sees."""
        keep, firsts = self._num_blocks(num_tokens), self._visibility.first_visible(num_tokens)
        return all(HOLE not in table[first:keep] for table, first in zip(sequence.tables, firsts, strict=True))

    @exclusive
    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Cuts a sequence to its first `num_tokens` tokens; also takes an open step back."""
        sequence.cut_tokens(num_tokens, self.block_size)
        self.host.cancel_step()
        self._release(sequence.cut(self._num_blocks(num_tokens)))

    @exclusive
    def fork(self, sequence: Sequence) -> Sequence:
        """Another sequence on the same blocks."""
        self.allocator.acquire(sequence.blocks())
        return self._adopt(sequence.copy())

    @exclusive
    def select(self, sequences: list[Sequence], indices: list[int]) -> list[Sequence]:
        """Row `i` of the result is sequence `indices[i]`: moved, forked where it is named twice, released where never."""
        moved: set[int] = set()
        rows = []
        for i in indices:
            sequence = sequences[i]
            rows.append(self.fork(sequence) if id(sequence) in moved else sequence)
            moved.add(id(sequence))
        self.abandon(sequence for sequence in sequences if id(sequence) not in moved)
        self._drain()
        return rows

    @exclusive
    def release(self, sequence: Sequence) -> None:
        """Gives all blocks of a sequence back. Releasing twice does nothing."""
        if not self._registry.remove(sequence):
            return
        blocks = sequence.blocks()
        sequence.tables, sequence.num_tokens = [[] for _ in self.windows], 0
        sequence.forget_tokens()
        self._release(blocks)

    def abandon(self, sequences: Iterable[Sequence]) -> None:
        """Like `release`, but later: safe in finalizers, which may run at any point of any thread."""
        self._abandoned.extend(sequences)

    @exclusive
    def clear_prefix_cache(self) -> None:
        """Forgets all prefixes; sequences in use keep their blocks but no longer share new ones."""
        self._drain()
        for block in self.index.blocks():
            self._forget(block)
        self.host.clear()
        for sequence in self._registry.live():
            sequence.forget_tokens()

    @exclusive
    def check(self) -> None:
        """Raises `PagedCacheError` if any invariant of the bookkeeping is broken."""
        self._drain()
        live = self._registry.live()
        self.allocator.check([sequence.blocks() for sequence in live])
        self.host.check()
        self.index.check({b for b in range(self.allocator.num_blocks) if self.allocator.is_indexed(b)})
        for sequence in live:
            sequence.check(self.block_size, self._visibility.first_visible(sequence.num_tokens))

    def _commit(self, sequence: Sequence, keep_past: bool = False) -> None:
        if sequence.node is not None:
            sequence.tail += sequence.fresh
            sequence.fresh = []
            while len(sequence.tail) >= self.block_size:
                self._register(sequence)
        if self.host.num_blocks:
            self.host.end_step(sequence)
        if self._has_windows and not keep_past:
            self._release(sequence.drop_past(self._visibility.first_visible(sequence.num_tokens)))

    def _adopt(self, sequence: Sequence) -> Sequence:
        self._registry.add(sequence)
        return sequence

    def _drain(self) -> None:
        while self._abandoned:
            self.release(self._abandoned[0])
            self._abandoned.popleft()
        self._release(self._registry.take_lost())

    def _repair(self) -> None:
        """What the tables say is true: references are counted again, and no prefix is believed any more."""
        live = self._registry.live()
        for sequence in live:
            sequence.forget_tokens()
            sequence.cut(self._num_blocks(sequence.num_tokens))
        self.index.clear()
        self.host.reset()
        self.on_free(self.allocator.recount([sequence.blocks() for sequence in live]))

    def _evict(self, blocks: list[int]) -> None:
        if self.host.num_blocks:
            self.host.save(blocks)
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        was_referenced = self.allocator.ref_count(block) > 0
        self.index.remove(block)
        self.allocator.unmark_indexed(block)
        if not was_referenced:
            self.on_free([block])

    def _release(self, blocks: Iterable[int]) -> None:
        self.on_free(self.allocator.release(blocks))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _append(self, growth: Growth, end: End) -> None:
        sequence = growth.sequence
        first = sequence.num_tokens // self.block_size
        for table, blocks in zip(sequence.tables, end, strict=True):
            if table[first:] != blocks:
                table[first:] = blocks
                sequence.touch()
        if growth.tokens is None and growth.num_tokens:
            sequence.forget_tokens()
        elif sequence.node is not None and growth.tokens:
            sequence.fresh = list(growth.tokens)
        sequence.num_tokens += growth.num_tokens  # last: tables of an interrupted step are cut to it

    def _register(self, sequence: Sequence) -> None:
        self._release(register(sequence, self.index, self.allocator, self.block_size))
