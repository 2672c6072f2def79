"""Plans which blocks new tokens go to, before anything is changed. Plain Python."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from .allocator import BlockAllocator
from .prefix import PrefixNode
from .sequence import Sequence

SKIP = -1
"""Slot of a token that is not written, because its block holds it already."""


@dataclass(frozen=True)
class Growth:
    """`num_tokens` new tokens of one sequence; `tokens` are their ids, None if unknown."""

    sequence: Sequence
    num_tokens: int
    tokens: list[int] | None = None


Source: TypeAlias = PrefixNode | tuple[int, int] | None
"""Where a block comes from: the prefix index, another row of the step, or None for a new one.

A row is named with an index: from the block with its first new token on.
"""


class Leader(NamedTuple):
    """A full block that the step computes, for later rows to share.

    Attributes:
        place: Stands for the prefix that ends with this block; below 0, so that it is no node's id.
        block: See `Source`; None if the block was there before and cannot be shared.
    """

    place: int
    block: tuple[int, int] | None


Leaders: TypeAlias = dict[tuple[int, tuple[int, ...]], Leader]


@dataclass
class RowPlan:
    """What one growth does.

    Attributes:
        sources: One for each block behind those that the sequence has already.
        keeps_partial: The partly filled last block is known to hold exactly the tokens that come: nothing is written.
        writes_partial: The growth writes into the partly filled last block.
    """

    sources: list[Source] = field(default_factory=list)
    keeps_partial: bool = False
    writes_partial: bool = False


@dataclass
class Plan:
    """What a step does.

    Attributes:
        rows: One for each growth.
        num_new: Blocks to allocate: new ones, and copies of shared ones.
        num_cached: Cached blocks that come into use.
    """

    rows: list[RowPlan]
    num_new: int
    num_cached: int


class GrowthPlanner:
    """Decides for each new block whether it can be shared; reads the bookkeeping and changes nothing."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self._allocator = allocator
        self._block_size = block_size

    def plan(self, growths: list[Growth]) -> Plan:
        """What the growths need. Rows that compute the same full block share it from the first of them on."""
        leaders: Leaders = {}
        rows = [self._plan_row(row, growth, leaders) for row, growth in enumerate(growths)]
        for growth, row in zip(growths, rows, strict=True):
            is_partial = growth.num_tokens > 0 and growth.sequence.num_tokens % self._block_size > 0
            row.writes_partial = is_partial and not row.keeps_partial
        num_groups = len(growths[0].sequence.tables) if growths else 0
        hits = Counter(
            block for row in rows for source in row.sources if isinstance(source, PrefixNode) for block in source.held()
        )
        new = sum(source is None for row in rows for source in row.sources) * num_groups
        num_cached = sum(self._allocator.ref_count(block) == 0 for block in hits)
        return Plan(rows, new + self._num_copies(growths, rows, hits), num_cached)

    def _num_copies(self, growths: list[Growth], plans: list[RowPlan], hits: Counter[int]) -> int:
        written = Counter(
            table[-1]
            for growth, plan in zip(growths, plans, strict=True)
            if plan.writes_partial
            for table in growth.sequence.tables
        )
        # the last writer of a block that nobody else holds, or takes from the index in this step, writes in place
        return sum(min(n, self._allocator.ref_count(block) + hits[block] - 1) for block, n in written.items())

    def _plan_row(self, row: int, growth: Growth, leaders: Leaders) -> RowPlan:
        size, sequence = self._block_size, growth.sequence
        num_blocks = -(-(sequence.num_tokens + growth.num_tokens) // size)
        plan = RowPlan()
        if sequence.node is None or growth.tokens is None:
            plan.sources = [None] * (num_blocks - -(-sequence.num_tokens // size))
            return plan
        node: PrefixNode | None = sequence.node
        place = id(node)  # where the prefix so far stands: a node, or below 0 a block that only this step computes
        stream = sequence.tail + growth.tokens
        for start in range(0, (num_blocks - sequence.node.depth) * size, size):
            tokens = tuple(stream[start : start + size])
            if len(tokens) < size:  # not full: only its own row can use it
                plan.sources += [None] if start or not sequence.tail else []
                break
            child = node.children.get(tokens) if node is not None else None
            index = bool(sequence.tail) + len(plan.sources)
            leader = leaders.get((place, tokens))
            if start == 0 and sequence.tail:
                plan.keeps_partial = child is not None and child.blocks == [table[-1] for table in sequence.tables]
                leaders.setdefault((place, tokens), Leader(-len(leaders) - 1, None))
            else:
                plan.sources.append(self._source(child, leader))
                if plan.sources[-1] is None:
                    leaders[place, tokens] = Leader(leader.place if leader else -len(leaders) - 1, (row, index))
            node = child
            place = id(child) if child is not None else leaders[place, tokens].place
        return plan

    @staticmethod
    def _source(child: PrefixNode | None, leader: Leader | None) -> Source:
        if child is not None and None not in child.blocks:
            return child
        return leader.block if leader else None
