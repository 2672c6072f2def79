"""Starts empty sequences with the blocks that are known of their tokens. Plain Python."""

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import OutOfBlocksError
from .allocator import BlockAllocator
from .offload import HostTier
from .prefix import Place, PrefixIndex, PrefixNode
from .sequence import HOLE, Sequence
from .windows import Windows


class Start(NamedTuple):
    """An empty sequence is to begin with the first `num_tokens` of `tokens`, as found by `match`."""

    sequence: Sequence
    tokens: list[int]
    num_tokens: int


class Needs(NamedTuple):
    """What starts take.

    Attributes:
        held: Blocks of the pool that hold what is needed.
        missing: Places whose content is in host memory only.
        num_free: Free blocks that they take: cached ones, and one for each missing place.
    """

    held: list[int]
    missing: list[Place]
    num_free: int


class Starter:
    """Finds prefixes in the pool and in host memory, and gives them to sequences."""

    def __init__(
        self, allocator: BlockAllocator, index: PrefixIndex, host: HostTier, visibility: Windows, block_size: int
    ) -> None:
        self._allocator, self._index, self._host = allocator, index, host
        self._visibility, self._block_size = visibility, block_size

    def match(self, sequence: Sequence, tokens: list[int], limit: int, from_host: bool) -> int:
        """See `BlockManager.match`."""
        if sequence.node is None:
            return 0
        nodes = self._nodes(Start(sequence, tokens, limit))
        found = self._visibility.usable(nodes, limit)
        return self._match_host(nodes, limit, found) if from_host and len(self._host) else found

    def needs(self, starts: list[Start]) -> Needs:
        """What starts take; what several of them need counts once."""
        return self._needs(
            place for start in starts if start.sequence.node is not None for place in self._places(start)
        )

    def take(self, starts: list[Start]) -> None:
        """Gives each sequence its blocks, after bringing those back that are in host memory only.

        Raises:
            OutOfBlocksError: There is no room for these; nothing was changed.
        """
        starts = [start for start in starts if start.sequence.node is not None and start.num_tokens]
        kept = self._restore(self.needs(starts)) if len(self._host) else []
        for start in starts:
            self._give(start)
        self._allocator.release(kept)

    def _match_host(self, nodes: list[PrefixNode], limit: int, found: int) -> int:
        """The most tokens for which there is room, if bringing them back takes less time than computing them again."""
        size = self._block_size
        most = self._visibility.usable(nodes, limit, from_host=True)
        while most > found:
            num_blocks = -(-most // size)
            _, missing, num_free = self._needs(self._visible(nodes[:num_blocks], most))
            shortage = num_free - self._allocator.num_free
            if shortage <= 0:
                return most if self._host.costs.pays_restoring(len(missing), most - found) else found
            num_blocks -= -(-shortage // len(self._visibility))  # one block less per group spares no more than that
            most = self._visibility.usable(nodes[: max(num_blocks, 0)], num_blocks * size, from_host=True)
        return found

    def _needs(self, places: Iterator[Place]) -> Needs:
        missing: dict[Place, None] = {}
        held: dict[int, None] = {}
        for node, group in places:
            block = node.blocks[group]
            if block is None:
                missing[node, group] = None
            else:
                held[block] = None
        num_idle = sum(self._allocator.ref_count(block) == 0 for block in held)
        return Needs(list(held), list(missing), num_idle + len(missing))

    def _restore(self, needs: Needs) -> list[int]:
        """Brings missing blocks back; returns blocks to release once sequences have them."""
        held, missing, num_free = needs
        if not missing:
            return []
        if not self._allocator.can_allocate(num_free):
            raise OutOfBlocksError(num_free, self._allocator.num_free)
        self._allocator.acquire(held)  # or they might be evicted for the others
        blocks = self._host.restore(missing, self._allocator.allocate)
        for (node, group), block in zip(missing, blocks, strict=True):
            self._index.put(node, group, block)
            self._allocator.mark_indexed(block)
        return [*held, *blocks]

    def _give(self, start: Start) -> None:
        sequence, tokens, num_tokens = start
        assert sequence.node is not None
        nodes, firsts = self._nodes(start), self._visibility.first_visible(num_tokens)
        for group, (table, first) in enumerate(zip(sequence.tables, firsts, strict=True)):
            table.extend(HOLE if i < first else _block(node, group) for i, node in enumerate(nodes))
            self._allocator.acquire(block for block in table if block != HOLE)
        num_full = num_tokens // self._block_size
        sequence.node = nodes[num_full - 1] if num_full else sequence.node
        sequence.tail = list(tokens[num_full * self._block_size : num_tokens])
        sequence.touch()
        sequence.num_tokens = num_tokens

    def _places(self, start: Start) -> Iterator[Place]:
        return self._visible(self._nodes(start), start.num_tokens)

    def _visible(self, nodes: list[PrefixNode], num_tokens: int) -> Iterator[Place]:
        """What the token behind the first `num_tokens` sees, group by group."""
        for group, first in enumerate(self._visibility.first_visible(num_tokens)):
            for node in nodes[first:]:
                yield node, group

    def _nodes(self, start: Start) -> list[PrefixNode]:
        """The known path of blocks that hold a start's tokens."""
        sequence, tokens, num_tokens = start
        assert sequence.node is not None
        num_blocks = -(-num_tokens // self._block_size)
        return self._index.match(sequence.node, tokens[: num_blocks * self._block_size], self._block_size)


def _block(node: PrefixNode, group: int) -> int:
    block = node.blocks[group]
    assert block is not None
    return block
