"""Bytes of keys and values in a cache: allocated, and in use. Counted in the tensors and blocks themselves."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from .cache import PagedCache
from .memory.sequence import HOLE


@dataclass(frozen=True)
class Memory:
    """Bytes of K and V: allocated, and those of them that hold tokens somebody asked for."""

    name: str
    reserved: int
    used: int

    @property
    def wasted(self) -> int:
        """Allocated for nothing."""
        return self.reserved - self.used

    @property
    def wasted_share(self) -> float:
        """Of what is allocated."""
        return self.wasted / max(self.reserved, 1)


def dense_memory(name: str, cache: Cache, spans: list[tuple[int, int]], end: int) -> Memory:
    """Of one of transformers' caches.

    Args:
        name: To show.
        cache: After its run.
        spans: Per row the first column that is no padding, and the one after the last that holds a token of the answer.
        end: Columns that were written; a layer with a window has the last of them only.
    """
    reserved = used = 0
    for keys, values in key_value_tensors(cache):
        batch, _, num_columns, _ = keys.shape
        nbytes = keys.nbytes + values.nbytes
        first = max(end - num_columns, 0)
        num_tokens = sum(max(stop - max(start, first), 0) for start, stop in spans)
        reserved += nbytes
        used += num_tokens * nbytes // (batch * num_columns)
    return Memory(name, reserved, used)


def paged_memory(name: str, cache: PagedCache, lengths: list[int]) -> Memory:
    """Of the blocks that a cache holds, each counted once; `lengths` are the tokens per row that are no padding."""
    pool, used = cache.pool, dict[int, int]()
    for length, tables in zip(lengths, cache.block_tables, strict=True):
        for window, table in zip(pool.manager.windows, tables, strict=True):
            first = 0 if window is None else max(length - window + 1, 0)
            for i, block in enumerate(table):
                start, stop = i * pool.block_size, (i + 1) * pool.block_size
                used[block] = max(used.get(block, 0), min(length, stop) - max(first, start))
    used.pop(HOLE, None)
    per_block = pool.nbytes // pool.num_blocks
    return Memory(name, len(used) * per_block, sum(used.values()) * per_block // pool.block_size)


def key_value_tensors(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the layers that have them."""
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [(keys, values) for keys, values in pairs if keys is not None and values is not None and keys.dim() == 4]
