"""What every block of a pool is used for: whose it is, shared, cached or free. `picture.py` draws it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .cache import PagedCache
from .pool import BlockPool

Kind = Literal["free", "cached", "referenced"]


@dataclass(frozen=True)
class Owner:
    """One row of a cache.

    Attributes:
        name: That of the cache.
        letter: Stands for the row; letters repeat after 26 rows.
        tables: Per layer group its block ids, -1 where a block behind a window went back.
        num_tokens: Tokens in them.
    """

    name: str
    letter: str
    tables: list[list[int]]
    num_tokens: int


@dataclass(frozen=True)
class BlockState:
    """One block of a pool.

    Attributes:
        kind: Its state; see `num_refs` for whether it is shared.
        num_refs: Tables that hold it.
        owners: Those of them that the map was asked for, by their place in `PoolMap.owners`.
        num_tokens: Tokens in it; all slots for a cached block, 0 for a free one and for one of others.
    """

    kind: Kind
    num_refs: int
    owners: tuple[int, ...]
    num_tokens: int

    @property
    def is_shared(self) -> bool:
        """Whether several tables hold the block."""
        return self.num_refs > 1


@dataclass(frozen=True)
class PoolMap:
    """A pool at one moment. `blocks[i]` is block `i`."""

    owners: tuple[Owner, ...]
    blocks: tuple[BlockState, ...]
    block_size: int

    def count(self, kind: Kind) -> int:
        """Blocks in one state."""
        return sum(block.kind == kind for block in self.blocks)

    @property
    def num_shared(self) -> int:
        """Blocks that several tables hold."""
        return sum(block.is_shared for block in self.blocks)

    @property
    def summary(self) -> str:
        """How many blocks there are in each state, in words."""
        return (
            f"{len(self.blocks)} blocks of {self.block_size} tokens, {self.count('referenced')} in use "
            f"({self.num_shared} of them shared), {self.count('cached')} cached, {self.count('free')} free"
        )

    @property
    def names(self) -> dict[str, list[Owner]]:
        """The rows of each cache."""
        names: dict[str, list[Owner]] = {}
        for owner in self.owners:
            names.setdefault(owner.name, []).append(owner)
        return names


def pool_map(
    pool: BlockPool,
    caches: Mapping[str, PagedCache] | None = None,
    rows: Iterable[tuple[str, list[list[int]], int]] = (),
) -> PoolMap:
    """What every block of `pool` is used for now.

    Args:
        pool: To look at.
        caches: By the name to show, the caches whose rows are told apart. Blocks of others are shown as theirs.
        rows: Others that are told apart: name, block tables per layer group, and number of tokens.
    """
    pool.stats()  # takes back what collected caches held
    found = [*_rows(caches or {}), *rows]
    owners = tuple(
        Owner(name, chr(ord("A") + i % 26), [list(table) for table in tables], num_tokens)
        for i, (name, tables, num_tokens) in enumerate(found)
    )
    held: dict[int, list[int]] = {}
    filled: dict[int, int] = {}
    for index, owner in enumerate(owners):
        for table in owner.tables:
            for i, block in enumerate(table):
                held.setdefault(block, []).append(index)
                filled[block] = max(filled.get(block, 0), min(owner.num_tokens - i * pool.block_size, pool.block_size))
    states = [_state(pool, block, tuple(held.get(block, ())), filled.get(block, 0)) for block in range(pool.num_blocks)]
    return PoolMap(owners, tuple(states), pool.block_size)


def _rows(caches: Mapping[str, PagedCache]) -> Iterator[tuple[str, list[list[int]], int]]:
    for name, cache in caches.items():
        for row in cache._state.rows or []:
            yield name, row.tables, row.num_tokens


def _state(pool: BlockPool, block: int, owners: tuple[int, ...], num_tokens: int) -> BlockState:
    allocator = pool.manager.allocator
    num_refs = allocator.ref_count(block)
    if num_refs:
        return BlockState("referenced", num_refs, owners, num_tokens)
    if allocator.is_indexed(block):
        return BlockState("cached", 0, (), pool.block_size)
    return BlockState("free", 0, (), 0)
