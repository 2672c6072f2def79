"""The free blocks of a pool, kept so that a sequence's blocks lie side by side where possible. Plain Python."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

ROOM = 16
"""Blocks that a sequence can usually grow by before it meets a neighbour."""


class FreeBlocks:
    """A set of block ids as extents: contiguous runs, as long as possible.

    Memory gives a CPU more of a long run than of blocks here and there. A sequence continues behind its last block. It
    begins in the first extent that holds it and leaves room to grow, to itself and to the sequence before it, so what
    is in use stays at low addresses.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self._starts: list[int] = []  # of extents, ascending
        self._end_of: dict[int, int] = {}  # by start; the end is the block behind the last one
        self._start_of: dict[int, int] = {}  # by end
        self._count = 0
        for block in blocks:
            self.add(block)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        extents = sorted(self._end_of.items())  # one dict only: a change may have been interrupted half done
        return (block for start, end in extents for block in range(start, end))

    def add(self, block: int) -> None:
        """Adds a block that is not in the set, and joins it with its neighbours."""
        start, end = block, block + 1
        if block in self._start_of:
            start, _ = self._remove(self._start_of[block])
        if end in self._end_of:
            _, end = self._remove(end)
        self._insert(start, end)

    def take(self, num_blocks: int, after: int | None = None) -> list[int]:
        """Removes `num_blocks` blocks, of at least as many; those behind the block `after` if they are there."""
        taken: list[int] = []
        while len(taken) < num_blocks:
            left = num_blocks - len(taken)
            follows = after is not None and after + 1 in self._end_of
            extent, start = (after + 1, after + 1) if after is not None and follows else self._place(left)
            taken += self._cut(extent, start, left)
            after = taken[-1]
        return taken

    def _place(self, num_blocks: int) -> tuple[int, int]:
        """Where a sequence of `num_blocks` begins: start of an extent, block in it."""
        for start in self._starts:
            gap = ROOM if start else 0
            if self._end_of[start] - start >= gap + num_blocks + ROOM:
                return start, start + gap
        longest = max(self._starts, key=lambda start: self._end_of[start] - start)
        return longest, longest

    def _cut(self, extent: int, first: int, most: int) -> range:
        """Takes up to `most` blocks out of an extent, from `first` on."""
        start, end = self._remove(extent)
        stop = min(end, first + most)
        if start < first:
            self._insert(start, first)
        if stop < end:
            self._insert(stop, end)
        return range(first, stop)

    def _insert(self, start: int, end: int) -> None:
        insort(self._starts, start)
        self._end_of[start], self._start_of[end] = end, start
        self._count += end - start

    def _remove(self, start: int) -> tuple[int, int]:
        end = self._end_of.pop(start)
        del self._start_of[end], self._starts[bisect_left(self._starts, start)]
        self._count -= end - start
        return start, end
