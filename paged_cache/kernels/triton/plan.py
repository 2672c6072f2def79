"""Who does what: the work list of an attention call, written on the device from the lengths of the rows.

A *query tile* is a run of query rows (all heads of a group, token after token) that one program holds, a *split* a part of
the keys that a query tile sees. An *item* of the work list is one query tile and one split. The list has room for as many
items as the shapes allow, whatever the lengths turn out to be: nothing waits for the device, and a CUDA graph of the call
stays right while the sequences grow.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import CachedLaunch

LANES = 64  # items that a program of the planner writes
MEMORY_BOUND_ROWS = 32  # with more query rows in a tile, arithmetic takes longer than loading keys
COMPUTE_BOUND_SPLIT = 4096  # keys worth a split then
INVARIANT_SPLIT = 512  # keys of a split where the batch may not change a bit of the result
FIELDS = ("row", "tile", "split", "num_splits", "split_len", "slot")
"""What the work list says about an item: `[len(FIELDS), max_items]`, row -1 where there is none.

`split_len` is in keys, `slot` the place of the tile's first partial result, or -1 if the tile is not split.
"""


@triton.jit
def visible(length, q_len, first_token, last_token, start, window, chunk, capacity):
    """The keys `low .. high - 1` that the queries `first_token .. last_token` of a row see together."""
    position = length - q_len + first_token
    low = tl.maximum(start, 0)
    if window is not None:
        low = tl.maximum(low, position - window + 1)
    if chunk is not None:
        low = tl.maximum(low, tl.maximum(position, 0) // chunk * chunk)
    high = tl.minimum(length - q_len + last_token + 1, capacity)
    return low, tl.maximum(low, high)


@triton.jit
def _row_work(row, ok, lens_ptr, cu_ptr, starts_ptr, q_len, capacity, window, chunk, GROUP, ROWS, TILE):
    """Query tiles of some rows, and the most keys that one of the tiles has to walk over."""
    length = tl.load(lens_ptr + row, mask=ok, other=0)
    if cu_ptr is not None:
        q_len = tl.load(cu_ptr + row + 1, mask=ok, other=0) - tl.load(cu_ptr + row, mask=ok, other=0)
    start = 0
    if starts_ptr is not None:
        start = tl.load(starts_ptr + row, mask=ok, other=0)
    low, high = visible(length, q_len, 0, q_len - 1, start, window, chunk, capacity)
    keys = tl.where(low < high, high - low // TILE * TILE, 0)  # a tile begins at a multiple of TILE
    reach = (ROWS - 1) // GROUP + 2 * TILE  # how far a tile's last key may lie beyond what its first query sees
    if window is not None:
        keys = tl.minimum(keys, window + reach)
    if chunk is not None:
        keys = tl.minimum(keys, chunk + reach)
    return tl.where(ok, tl.cdiv(q_len * GROUP, ROWS), 0), keys


@triton.jit(do_not_specialize=["num_rows", "max_items", "q_len", "capacity", "window", "chunk", "extra", "min_split"])
def _plan_kernel(
    work_ptr,  # int32 [FIELDS, max_items]
    lens_ptr,  # int32 [num_rows]
    cu_ptr,  # int32 [num_rows + 1] or None
    starts_ptr,  # int32 [num_rows] or None
    num_rows,
    max_items,
    q_len,  # of every row, unless there is cu_ptr
    capacity,  # keys that a row of the block table can hold
    window,  # or None, as is the next
    chunk,
    extra,  # items that splitting may add
    min_split,  # keys
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FIXED: tl.constexpr,  # whether every split has min_split keys, or as few above that as `extra` items allow
    LANES: tl.constexpr,  # items of a program, and rows that it looks at in one step
):
    lane = tl.arange(0, LANES)

    # With at least all_keys / extra keys per split, the splits of all tiles are at most `extra` more than the tiles.
    split_len = min_split
    if not FIXED:
        all_keys = tl.zeros([LANES], tl.int64)
        for begin in range(0, num_rows, LANES):
            tiles, keys = _row_work(
                begin + lane, begin + lane < num_rows, lens_ptr, cu_ptr, starts_ptr,
                q_len, capacity, window, chunk, GROUP, ROWS, TILE,
            )  # fmt: skip
            all_keys += tiles.to(tl.int64) * keys
        share = tl.cdiv(tl.sum(all_keys, 0), tl.maximum(extra, 1).to(tl.int64))
        # No tile has more than `capacity` keys; the share of a large batch may not fit into 32 bits.
        split_len = tl.maximum(tl.minimum(share, capacity), min_split).to(tl.int32)

    # Every program walks over all rows, and fills in the items of its own that it meets.
    item = tl.program_id(0) * LANES + lane
    found_row = tl.full([LANES], -1, tl.int32)
    found_tile = tl.zeros([LANES], tl.int32)
    found_split = tl.zeros([LANES], tl.int32)
    found_splits = tl.zeros([LANES], tl.int32)
    found_len = tl.zeros([LANES], tl.int32)
    found_slot = tl.full([LANES], -1, tl.int32)
    num_items = 0
    num_slots = 0
    for begin in range(0, num_rows, LANES):
        tiles, keys = _row_work(
            begin + lane, begin + lane < num_rows, lens_ptr, cu_ptr, starts_ptr,
            q_len, capacity, window, chunk, GROUP, ROWS, TILE,
        )  # fmt: skip
        splits = tl.maximum(tl.cdiv(keys, split_len), 1)
        if FIXED:
            splits = tl.where(tiles > 1, 1, splits)  # a prompt is split by its queries already
            lengths = tl.zeros_like(splits) + split_len
        else:
            lengths = tl.cdiv(tl.cdiv(keys, splits), TILE) * TILE  # evenly
        items = tiles * splits
        slots = tl.where(splits > 1, items, 0)
        first_item = num_items + tl.cumsum(items, 0) - items
        first_slot = num_slots + tl.cumsum(slots, 0) - slots
        num_items += tl.sum(items, 0)
        num_slots += tl.sum(slots, 0)

        place = item[:, None] - first_item[None, :]  # [item, row]
        mine = (place >= 0) & (place < items[None, :])
        nth_tile = place // splits[None, :]
        slot = first_slot[None, :] + nth_tile * splits[None, :]
        found_row += tl.sum(tl.where(mine, (begin + lane)[None, :] + 1, 0), 1)
        # The last tiles of a prompt see most: they come first, lest they end last.
        found_tile += tl.sum(tl.where(mine, tiles[None, :] - 1 - nth_tile, 0), 1)
        found_split += tl.sum(tl.where(mine, place % splits[None, :], 0), 1)
        found_splits += tl.sum(tl.where(mine, splits[None, :], 0), 1)
        found_len += tl.sum(tl.where(mine, lengths[None, :], 0), 1)
        found_slot += tl.sum(tl.where(mine & (splits > 1)[None, :], slot + 1, 0), 1)

    ok = item < max_items
    tl.store(work_ptr + item, found_row, mask=ok)
    tl.store(work_ptr + max_items + item, found_tile, mask=ok)
    tl.store(work_ptr + 2 * max_items + item, found_split, mask=ok)
    tl.store(work_ptr + 3 * max_items + item, found_splits, mask=ok)
    tl.store(work_ptr + 4 * max_items + item, found_len, mask=ok)
    tl.store(work_ptr + 5 * max_items + item, found_slot, mask=ok)


class Plan(NamedTuple):
    """A work list, and what the shapes say about it."""

    work: torch.Tensor  # int32 `[len(FIELDS), max_items]`
    max_items: int
    max_slots: int  # partial results; 0 if no tile can be split


class Shape(NamedTuple):
    """All that the host knows of a call's work.

    Attributes:
        num_tokens: New tokens of all rows.
        max_q_len: Most new tokens of a row.
        capacity: Keys that a row of the block table can hold.
        window, chunk: See `reference.paged_attention`.
        group: Query heads per KV head.
        rows: Query rows of a tile.
        tile: Keys of one step of a program.
        fill: Items that keep the GPU busy.
        fixed: Whether splits have the same length in any batch.
    """

    num_tokens: int
    max_q_len: int
    capacity: int
    window: int | None
    chunk: int | None
    group: int
    rows: int
    tile: int
    fill: int
    fixed: bool

    def plan(self, lens: torch.Tensor, cu: torch.Tensor | None, starts: torch.Tensor | None) -> Plan:
        """Write the work list for rows of these lengths: `seq_lens`, `cu_seqlens_q` and `kv_starts` as int32."""
        batch = lens.shape[0]
        num_tiles = batch * triton.cdiv(self.max_q_len * self.group, self.rows)
        if cu is not None:
            num_tiles = min(num_tiles, batch + self.num_tokens * self.group // self.rows)
        extra, min_split = self._budget(batch, num_tiles)
        max_items = num_tiles + extra
        max_slots = min(2 * extra, max_items)  # a tile is only split into parts of at least all_keys / extra
        work = lens.new_empty(len(FIELDS), max_items)
        _planner(self.group, self.rows, self.tile, self.fixed)(
            (triton.cdiv(max_items, LANES), 1, 1),
            work, lens, cu, starts,
            batch, max_items, self.max_q_len, self.capacity, self.window, self.chunk, extra, min_split,
        )  # fmt: skip
        return Plan(work, max_items, max_slots)

    def _budget(self, batch: int, num_tiles: int) -> tuple[int, int]:
        """Items that splitting may add, and the fewest keys worth a split."""
        reach = (self.rows - 1) // self.group + 2 * self.tile
        longest = min([self.capacity] + [x + reach for x in (self.window, self.chunk) if x is not None])
        used_rows = min(self.rows, self.max_q_len * self.group)
        if self.fixed:
            extra, min_split = batch * (triton.cdiv(longest, INVARIANT_SPLIT) - 1), INVARIANT_SPLIT
        elif 2 * num_tiles <= self.fill:  # one wave of programs, as full as it can be
            extra, min_split = self.fill - num_tiles + 1, self.tile
        elif used_rows <= MEMORY_BOUND_ROWS:  # many items balance a ragged batch; partial results: below 2 % of K and V
            extra, min_split = 8 * self.fill, 128 * triton.next_power_of_2(used_rows)
        else:  # enough to do for all; only a tile of more than twice its share would be left over at the end
            extra, min_split = max(1, self.fill // 2), COMPUTE_BOUND_SPLIT
        return (extra if longest > min_split else 0), min_split


@functools.cache
def _planner(group: int, rows: int, tile: int, fixed: bool) -> CachedLaunch:
    constants = {"GROUP": group, "ROWS": rows, "TILE": tile, "FIXED": fixed, "LANES": LANES}
    return CachedLaunch(_plan_kernel, constants, num_warps=4, enable_fp_fusion=True)
