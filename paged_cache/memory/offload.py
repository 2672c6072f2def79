"""The second tier of the prefix index: what the pool evicts goes to host memory, and comes back. Plain Python."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

from ..errors import PagedCacheError
from .growth import Growth
from .offload_costs import OffloadCosts, Stopwatch
from .prefix import Place, PrefixIndex
from .sequence import Sequence

LONG_STEP = 64
"""Tokens of a step that says what computing a prompt takes; shorter ones take as long as they do for other reasons."""

Copy = Callable[[list[tuple[int, int]]], None]


@dataclass
class HostCounters:
    """Blocks over the tier's lifetime.

    Attributes:
        offloaded: Copied to host memory.
        restored: Copied back.
        not_offloaded: Evicted from the pool without a copy, because computing them again is cheaper.
    """

    offloaded: int = 0
    restored: int = 0
    not_offloaded: int = 0


class HostTier:
    """Host blocks, and what each of them stands for.

    A block that is evicted from the pool is copied to a host block, of which the least recently used one is given up
    for it. A later prefix that needs it gets a block of the pool with its content. The host block stays, so that the next eviction
    costs nothing, but is the first one to be given up.

    Args:
        num_blocks: Host blocks; 0 for no tier.
        index: Its nodes remember host blocks.
        costs: Decides whether a copy is made.

    Attributes:
        on_save: Called with (block, host block) pairs to copy.
        on_load: Called with (host block, block) pairs to copy.
        on_free: Called with host blocks that became free: tests poison them.
        stopwatch: Times copies and steps, on the device where they run.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex, costs: OffloadCosts) -> None:
        self.num_blocks, self.costs = num_blocks, costs
        self.counters = HostCounters()
        self.stopwatch = Stopwatch()
        self.on_save: Copy = lambda pairs: None
        self.on_load: Copy = lambda pairs: None
        self.on_free: Callable[[list[int]], None] = lambda blocks: None
        self._index = index
        self._step: tuple[ref[Sequence], int, Any] | None = None
        self.reset()

    def __len__(self) -> int:
        return len(self._places)

    def save(self, blocks: list[int]) -> None:
        """Keeps the content of blocks that the pool is about to evict, least recently used first, if that pays."""
        new = []
        for block in blocks:
            node, group = self._index.place(block)
            known = node.host_blocks[group]
            if known is None:
                new.append(block)
            else:
                self._places.move_to_end(known)
        if not new:
            return
        if not self.costs.pays_saving():
            self.counters.not_offloaded += len(new)
            return
        while len(self._free) < len(new) and self._places:
            self._give_up(next(iter(self._places)))
        pairs = [(block, self._free.pop()) for block in new[max(len(new) - len(self._free), 0) :]]
        if not pairs:
            return
        self._copy(self.on_save, pairs)
        for block, host_block in pairs:
            node, group = self._places[host_block] = self._index.place(block)
            node.host_blocks[group] = host_block
        self.counters.offloaded += len(pairs)

    def restore(self, places: list[Place], allocate: Callable[[int], list[int]]) -> list[int]:
        """Blocks of the pool with the content of host blocks.

        Args:
            places: What the host blocks stand for; all different.
            allocate: Gives blocks of the pool. Those that it evicts may be saved meanwhile, but not in place of these.
        """
        host_blocks = [_host_block(place) for place in places]
        for host_block in host_blocks:
            self._lent[host_block] = self._places.pop(host_block)
        try:
            blocks = allocate(len(places))
            self._copy(self.on_load, list(zip(host_blocks, blocks, strict=True)))
        finally:
            for host_block in host_blocks:
                self._places[host_block] = self._lent.pop(host_block)
                self._places.move_to_end(host_block, last=False)
        self.counters.restored += len(blocks)
        return blocks

    def clear(self) -> None:
        """Gives up all host blocks."""
        for host_block in list(self._places):
            self._give_up(host_block)

    def reset(self) -> None:
        """All host blocks are free, whatever was going on; for an index that knows nothing any more."""
        self._places: OrderedDict[int, Place] = OrderedDict()  # least recently used first
        self._lent: dict[int, Place] = {}  # in use by `restore`
        self._free = list(reversed(range(self.num_blocks)))
        self._step = None
        self.on_free(list(self._free))

    def begin_step(self, growths: list[Growth]) -> None:
        """A forward follows: if it is over many tokens, it says what computing a prompt takes."""
        num_tokens = sum(growth.num_tokens for growth in growths)
        if num_tokens >= LONG_STEP:
            self._step = ref(growths[0].sequence), num_tokens, self.stopwatch.start()

    def end_step(self, sequence: Sequence) -> None:
        """The forward that a sequence was in has returned."""
        if self._step is not None and self._step[0]() is sequence:
            _, num_tokens, mark = self._step
            self._step = None
            self.stopwatch.stop(mark, lambda seconds: self.costs.observe_forward(num_tokens, seconds))

    def cancel_step(self) -> None:
        """The forward failed."""
        self._step = None

    def check(self) -> None:
        """Raises `PagedCacheError` unless each host block is free or stands for one place that can be found."""
        states = [*self._places, *self._free]
        if self._lent or len(states) != self.num_blocks or len(set(states)) != self.num_blocks:
            raise PagedCacheError(
                f"{len(self._places)} used + {len(self._free)} free host blocks, {len(self._lent)} on loan, do not make "
                f"{self.num_blocks} distinct ones"
            )
        for host_block, (node, group) in self._places.items():
            if node.host_blocks[group] != host_block:
                raise PagedCacheError(f"host block {host_block} is not where the prefix index says")
            if not self._index.is_reachable(node):
                raise PagedCacheError(f"host block {host_block} cannot be found from its root")
        known = sum(block is not None for node in self._index.nodes() for block in node.host_blocks)
        if known != len(self._places):
            raise PagedCacheError(f"the prefix index has {known} host blocks, {len(self._places)} are in use")

    def _copy(self, copy: Copy, pairs: list[tuple[int, int]]) -> None:
        mark = self.stopwatch.start()
        copy(pairs)
        self.stopwatch.stop(mark, lambda seconds: self.costs.observe_copy(len(pairs), seconds))

    def _give_up(self, host_block: int) -> None:
        node, group = self._places.pop(host_block)
        node.host_blocks[group] = None
        self._free.append(host_block)
        self._index.prune(node)
        self.on_free([host_block])


def _host_block(place: Place) -> int:
    node, group = place
    host_block = node.host_blocks[group]
    assert host_block is not None
    return host_block
