"""The quick way of one more token: most of them go into a block that is there and that nobody shares. Plain Python."""

from .allocator import BlockAllocator
from .sequence import Sequence


def has_room(sequence: Sequence, allocator: BlockAllocator, block_size: int) -> bool:
    """Whether the next token's slots, one per group, are in blocks that may be written."""
    if sequence.num_tokens % block_size == 0:
        return False
    for table in sequence.tables:  # a loop: this runs for every row of every step  # noqa: SIM110
        if not allocator.is_private(table[-1]):
            return False
    return True


def append_in_place(sequence: Sequence, token: int, block_size: int) -> list[int]:
    """Gives a sequence that `has_room` its next token, as the open step; returns the slot in each group."""
    offset = sequence.num_tokens % block_size
    if sequence.node is not None:
        sequence.fresh = [token]
    sequence.num_tokens += 1
    return [table[-1] * block_size + offset for table in sequence.tables]
