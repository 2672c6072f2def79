"""One row of a cache: its block tables, one per layer group. Plain Python."""

import itertools
from typing import TypeAlias

from ..errors import PagedCacheError
from .prefix import PrefixNode

HOLE = -1
"""Stands in a block table where the block went back to the pool because it is behind the group's window."""

Tables: TypeAlias = list[list[int]]
"""Per layer group the block ids in order."""

_versions = itertools.count()


class Sequence:
    """The tokens of one row, without padding: token `i` is in block `tables[group][i // block_size]`.

    Attributes:
        tables: Per layer group the block ids in order, `HOLE` for those that were returned.
        num_tokens: Tokens in the tables, those of an open step included.
        node: Where the tokens up to the last registered full block stand in the prefix index; None if the token ids
            are not known or must not be shared.
        tail: Token ids behind `node` that the model has computed.
        fresh: Token ids of the open step: they move to `tail` when it is committed.
        version: Changes with the tables, so that copies of them on a device know when they are stale. No other sequence
            ever has the same, unlike an `id`, which a new sequence may inherit from a dead one.
    """

    __slots__ = ("__weakref__", "fresh", "node", "num_tokens", "tables", "tail", "version")

    def __init__(self, num_groups: int, root: PrefixNode | None = None) -> None:
        self.tables: Tables = [[] for _ in range(num_groups)]
        self.num_tokens = 0
        self.node = root
        self.tail: list[int] = []
        self.fresh: list[int] = []
        self.touch()

    def touch(self) -> None:
        """Notes that a table changed."""
        self.version = next(_versions)

    def copy(self) -> "Sequence":
        """Another sequence with the same tables; the caller counts the references."""
        other = Sequence(0)
        other.tables = [list(table) for table in self.tables]
        other.num_tokens, other.node = self.num_tokens, self.node
        other.tail, other.fresh = list(self.tail), list(self.fresh)
        return other

    def forget_tokens(self) -> None:
        """From here on nothing of this sequence enters the prefix index."""
        self.node, self.tail, self.fresh = None, [], []

    def cut(self, num_blocks: int) -> list[int]:
        """Takes all blocks behind the first `num_blocks` off the tables and returns them, last ones first."""
        taken = [block for table in self.tables for block in reversed(table[num_blocks:]) if block != HOLE]
        for table in self.tables:
            del table[num_blocks:]
        self.touch()
        return taken

    def cut_tokens(self, num_tokens: int, block_size: int) -> None:
        """Remembers the first `num_tokens` tokens only; the blocks stay."""
        self.num_tokens = num_tokens
        if self.node is not None:
            tail, node = self.tail, self.node
            while node.depth * block_size > num_tokens:
                assert node.parent is not None
                tail, node = list(node.tokens), node.parent
            self.tail, self.node = tail[: num_tokens - node.depth * block_size], node
        self.fresh = []

    def drop_past(self, first_visible: list[int]) -> list[int]:
        """Takes the blocks before each group's first visible one out of the tables and returns them."""
        passed = []
        for table, first in zip(self.tables, first_visible, strict=True):
            i = first - 1
            while i >= 0 and table[i] != HOLE:
                passed.append(table[i])
                table[i] = HOLE
                i -= 1
        if passed:
            self.touch()
        return passed

    def blocks(self) -> list[int]:
        """All blocks the sequence holds, last ones first."""
        return [block for table in self.tables for block in reversed(table) if block != HOLE]

    def check(self, block_size: int, first_visible: list[int]) -> None:
        """Raises `PagedCacheError` unless tables, token ids and the blocks that each group still sees agree."""
        expected = -(-self.num_tokens // block_size)
        if any(len(table) != expected for table in self.tables):
            raise PagedCacheError(f"{self.num_tokens} tokens in tables of {[len(t) for t in self.tables]} blocks")
        if self.node is not None:
            known = self.node.depth * block_size + len(self.tail) + len(self.fresh)
            if known != self.num_tokens:
                raise PagedCacheError(f"the ids of {known} of {self.num_tokens} tokens are known")
        for group, (table, first) in enumerate(zip(self.tables, first_visible, strict=True)):
            if HOLE in table[first:]:
                raise PagedCacheError(f"group {group} lacks a block that its window still sees: {table}")
