"""Which sequences hold blocks, and which of them nobody holds any more. Plain Python."""

from collections import deque
from collections.abc import Iterator
from weakref import ref

from .sequence import HOLE, Sequence, Tables


class Registry:
    """The sequences that hold blocks.

    A sequence that is collected while it is registered was lost by its user, say because Ctrl-C came before the list it
    was meant for was complete. Its tables are kept until `take_lost`.
    """

    def __init__(self) -> None:
        self._tables: dict[ref[Sequence], Tables] = {}
        self._lost: deque[ref[Sequence]] = deque()

    def add(self, sequence: Sequence) -> None:
        """From now on `sequence` holds the blocks in its tables."""
        self._tables[ref(sequence, self._lost.append)] = sequence.tables

    def remove(self, sequence: Sequence) -> bool:
        """Whether `sequence` was registered; it is not any more."""
        return self._tables.pop(ref(sequence), None) is not None

    def take_lost(self) -> Iterator[int]:
        """The blocks of lost sequences, last ones first."""
        while self._lost:
            tables = self._tables.pop(self._lost.popleft(), [])
            yield from (block for table in tables for block in reversed(table) if block != HOLE)

    def live(self) -> list[Sequence]:
        """All sequences but the lost ones."""
        sequences = [reference() for reference in list(self._tables)]
        return [sequence for sequence in sequences if sequence is not None]
