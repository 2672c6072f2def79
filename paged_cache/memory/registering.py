"""Puts computed blocks into the prefix index. Plain Python."""

from .allocator import BlockAllocator
from .prefix import PrefixIndex
from .sequence import HOLE, Sequence


def register(sequence: Sequence, index: PrefixIndex, allocator: BlockAllocator, block_size: int) -> list[int]:
    """The first full block of `tail` enters the index, in all groups; returns blocks to release, which were computed twice."""
    assert sequence.node is not None
    tokens = tuple(sequence.tail[:block_size])
    depth, node, twice = sequence.node.depth, index.insert(sequence.node, tokens), []
    for group, table in enumerate(sequence.tables):
        mine, known = table[depth], node.blocks[group]
        if mine in (HOLE, known):
            continue
        if known is None:
            index.put(node, group, mine)
            allocator.mark_indexed(mine)
        else:  # one of them is enough
            allocator.acquire([known])
            table[depth] = known
            sequence.touch()
            twice.append(mine)
    sequence.node, sequence.tail = node, sequence.tail[block_size:]
    return twice
