"""Takes the blocks of a step that was planned, before any table has them. Plain Python."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from .allocator import BlockAllocator
from .growth import SKIP, Growth, Plan, RowPlan, Source
from .prefix import PrefixNode

End: TypeAlias = list[list[int]]
"""Per group the blocks of one row from the one with its first new token on."""


@dataclass
class Writes:
    """What a step has to do to the storage.

    Attributes:
        copies: (source, destination) blocks to copy before anything is written.
        slots: `slots[group][row]` is the slot of each new token of that row, or `SKIP`.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    slots: list[list[list[int]]] = field(default_factory=list)


class BlockTaker:
    """Counts the references of a planned step.

    Args:
        allocator: Where blocks come from.
        block_size: Tokens per block.
        forget: Takes a block out of the prefix index.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, forget: Callable[[int], None]) -> None:
        self._allocator, self._block_size, self._forget = allocator, block_size, forget

    def take(self, growths: list[Growth], plan: Plan) -> tuple[list[End], Writes]:
        """How each growth's tables end, and what is to be copied and written."""
        for row in plan.rows:
            for source in row.sources:
                if isinstance(source, PrefixNode):
                    self._allocator.acquire(source.held())
        if plan.num_new:
            self._allocator.make_room(plan.num_new)
        num_groups = len(growths[0].sequence.tables) if growths else 0
        ends: list[End] = []
        writes = Writes(slots=[[] for _ in range(num_groups)])
        for growth, row in zip(growths, plan.rows, strict=True):
            first = growth.sequence.num_tokens // self._block_size
            end = [table[first:] for table in growth.sequence.tables]
            if row.writes_partial:
                end = [[self._writable(block, writes)] for (block,) in end]
            new = self._new(growth, row, end)
            for source in row.sources:
                for blocks, block in zip(end, self._blocks(source, ends, new), strict=True):
                    blocks.append(block)
            for slots, blocks in zip(writes.slots, end, strict=True):
                slots.append(self._slots(growth, row, blocks))
            ends.append(end)
        return ends, writes

    def _new(self, growth: Growth, row: RowPlan, end: End) -> list[Iterator[int]]:
        """Per group the blocks that nothing shares, behind those that the row has."""
        count = sum(source is None for source in row.sources)
        known = [blocks or table for blocks, table in zip(end, growth.sequence.tables, strict=True)]
        return [iter(self._allocator.allocate(count, blocks[-1] if blocks else None)) for blocks in known]

    def _blocks(self, source: Source, ends: list[End], new: list[Iterator[int]]) -> list[int]:
        """One block per group."""
        if source is None:
            return [next(blocks) for blocks in new]
        if isinstance(source, PrefixNode):
            return source.held()
        row, index = source
        blocks = [blocks[index] for blocks in ends[row]]
        self._allocator.acquire(blocks)
        return blocks

    def _writable(self, block: int, writes: Writes) -> int:
        """Copy-on-write of a partly filled last block; one that only the prefix index shares leaves the index."""
        if self._allocator.ref_count(block) == 1:
            if self._allocator.is_indexed(block):
                self._forget(block)
            return block
        (copy,) = self._allocator.allocate(1)
        self._allocator.release([block])
        writes.copies.append((block, copy))
        return copy

    def _slots(self, growth: Growth, row: RowPlan, blocks: list[int]) -> list[int]:
        size = self._block_size
        first, left = growth.sequence.num_tokens % size, growth.num_tokens
        is_held = [row.keeps_partial] * (first > 0) + [source is not None for source in row.sources]
        slots: list[int] = []
        for block, held in zip(blocks, is_held, strict=True):
            count = min(size - first, left)
            start = block * size + first
            slots += [SKIP] * count if held else range(start, start + count)
            first, left = 0, left - count
        return slots
