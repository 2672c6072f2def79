"""The CPU kernel, compiled with numba: keys and values are read in place, block by block, in their own dtype.

The work is cut into items, see `units.py`. An item takes all query heads of its kv heads, walks its tokens tile by tile
and keeps a running softmax. Where a unit has more than one run, each item leaves partial sums, and the last one to
finish merges them. How a row is cut into tiles and runs depends on nothing but its own length, and heads know nothing of
each other, so a result is the same, bit for bit, in any batch, with any number of threads and wherever blocks lie.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from .locating import Stream, ask_first, load_scales, locate, ring_size
from .record import BF16, CALL, F16
from .results import leave, merge, write
from .scratch import F32, LOG2_E, NEVER, PAIR_FLOATS, TILE, Scratch, jit, pair_up
from .simd import mul, splat
from .simd_memory import address_of, atomic_add, load_part, poke, store
from .softmax import adjust, rescale, weigh
from .tile import accumulate, score
from .units import Unit, before_all, first_visible, next_unit, queries_of


def scratch_floats(rows: int, heads: int, width: int, v_width: int) -> tuple[int, ...]:
    """Floats of each part of a thread's `Scratch`, multiples of 16."""
    padded = (rows + 15) & -16
    return (
        rows * width,
        rows * v_width,
        rows * TILE,
        padded,
        padded,
        heads * TILE,
        heads * TILE,
        16 * TILE,
        PAIR_FLOATS * padded,
        4 * ring_size(heads),
    )


_scratch_floats = jit(scratch_floats)


@jit
def _scratch(call: Any, thread: int) -> Scratch:
    """The memory of a thread."""
    sizes = _scratch_floats(call.rows, call.heads, (call.dim + 15) & -16, (call.v_dim + 15) & -16)
    total = 0
    for size in sizes:
        total += size
    queries = call.scratch + 4 * thread * total
    sums = queries + 4 * sizes[0]
    scores = sums + 4 * sizes[1]
    tops = scores + 4 * sizes[2]
    totals = tops + 4 * sizes[3]
    key_scales = totals + 4 * sizes[4]
    value_scales = key_scales + 4 * sizes[5]
    places = value_scales + 4 * sizes[6]
    pairs = places + 4 * sizes[7]
    return Scratch(queries, sums, scores, tops, totals, key_scales, value_scales, places, pairs, pairs + 4 * sizes[8])


@jit
def _load_query(call: Any, at: int, target: int, factor: Any, kind: Any) -> None:
    factors = splat(factor)
    for x in range(0, call.dim, 16):
        store(target, x, mul(load_part(call.query, at + x, kind, min(call.dim - x, 16)), factors))


@jit
def _load_queries(call: Any, unit: Unit, head: int, target: int) -> None:
    """Queries of an item, scaled, as float32 [kv heads, queries, group, width]; zeros beyond the head dimension."""
    group, width = call.num_heads // call.num_kv_heads, (call.dim + 15) & -16
    factor = np.float32(call.scale / call.softcap if call.softcap > 0 else call.scale * LOG2_E)
    _, _, first = queries_of(call, unit.row)
    for h in range(unit.heads):
        for r in range(unit.queries * group):
            query, query_head = unit.query + r // group, (head + h) * group + r % group
            at = first + query_head * call.q_head + query * call.q_token
            if call.query_kind == 0:
                _load_query(call, at, target, factor, F32)
            elif call.query_kind == 1:
                _load_query(call, at, target, factor, BF16)
            else:
                _load_query(call, at, target, factor, F16)
            target += 4 * width


@jit
def _weigh(call: Any, unit: Unit, head: int, at: int, count: int, scratch: Scratch) -> None:
    """Scores of a tile of tokens from `at` on become weights."""
    group, v_width = call.num_heads // call.num_kv_heads, (call.v_dim + 15) & -16
    is_plain = call.softcap == 0 and call.slopes == 0 and call.bias == 0 and call.key_scales == 0
    for q in range(unit.queries):
        p = unit.position + q
        first = max(first_visible(call, unit.row, p) - at, 0) if p >= 0 else count
        end = min(p + 1 - at, count)
        for h in range(unit.heads):
            scales = 4 * h * TILE
            for g in range(group):
                row, query_head = (h * unit.queries + q) * group + g, (head + h) * group + g
                scores = scratch.scores + 4 * row * TILE
                if not is_plain:
                    bias = unit.row * call.bias_batch + query_head * call.bias_head + (unit.query + q) * call.bias_query
                    adjust(call, scores, scratch.key_scales + scales, query_head, bias, at, p, end)
                weigh(row, first, end, v_width, scratch)
                if call.value_scales != 0:
                    rescale(scores, scratch.value_scales + scales, end)


@jit
def _walk(call: Any, unit: Unit, head: int, start: int, end: int, scratch: Scratch, kind: Any) -> None:
    """Running softmax of an item, which has the tokens [start, end) of a row; leaves sums and state in the scratch."""
    rows = unit.queries * (call.num_heads // call.num_kv_heads)
    for x in range(0, rows * unit.heads * ((call.v_dim + 15) & -16), 16):
        store(scratch.sums, x, splat(F32))
    for r in range(rows * unit.heads):
        poke(scratch.tops, r, np.float32(NEVER))
        poke(scratch.totals, r, F32)
    _load_queries(call, unit, head, scratch.queries)
    pairs = pair_up(call, rows, unit.heads, scratch)
    count, places, following = min(TILE, end - start), scratch.places, scratch.places + 8 * 4 * TILE
    stream = Stream(0, 0, 0, 0, scratch.extents, ring_size(call.heads) - 1)
    stream = locate(call, stream, unit, head, start, count, places)
    for at in range(start, end, TILE):
        if call.key_scales != 0:
            load_scales(call, places, unit.heads, count, scratch)
        next_count = min(TILE, end - at - TILE)
        stream = locate(call, stream, unit, head, at + TILE, next_count, following)
        if at == start:
            stream = ask_first(stream)
        stream = score(call, stream, places, count, pairs, kind)
        _weigh(call, unit, head, at, count, scratch)
        stream = accumulate(call, stream, places + 8 * TILE, count, pairs, kind)
        places, following, count = following, places, next_count


@jit
def _work(call: Any, address: int, kind: Any) -> None:
    """Takes items until none is left. All threads run this at once; `address` is that of the call's counters."""
    group, scratch, unit = (
        call.num_heads // call.num_kv_heads,
        _scratch(call, atomic_add(address + 8, 1)),
        before_all(call),
    )
    while True:
        item = atomic_add(address, 1)
        while item >= unit.next_item:
            unit = next_unit(call, unit)
            if unit.row < 0:
                return
        slices, rows = call.num_kv_heads // unit.heads, unit.queries * group * unit.heads
        run, piece = (item - unit.first_item) // slices, (item - unit.first_item) % slices
        head, begin = piece * unit.heads, (unit.start // unit.run + run) * unit.run
        _walk(call, unit, head, max(unit.start, begin), min(unit.end, begin + unit.run), scratch, kind)
        if unit.runs == 1:
            write(call, unit, head, rows, scratch)
            continue
        leave(call, item, rows, scratch)
        counter = call.done + 8 * (unit.number * call.num_kv_heads + piece)
        if atomic_add(counter, 1) == unit.runs - 1:
            atomic_add(counter, -unit.runs)  # ready for the next call
            merge(call, unit, head, rows, scratch.sums)


_FILES = ("kernel", "units", "results", "record", "tile", "softmax", "locating", "scratch", "simd", "simd_memory")
_SOURCES = zlib.crc32(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in _FILES))


def entry(kind: Any) -> Callable[[Any], None]:
    """The function to compile for keys and values of one kind (see `simd_memory`); its argument points to a `CALL` record."""
    sources = _SOURCES  # numba's disk cache asks only whether this function has changed, so it has to hold all the code

    def work(pointer: Any) -> None:
        if sources >= 0:
            _work(numba.carray(pointer, (1,), CALL)[0], address_of(pointer), kind)

    return work
