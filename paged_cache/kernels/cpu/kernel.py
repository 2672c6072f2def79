"""The CPU kernel, compiled with numba: keys and values are read in place, block by block, in their own dtype.

The work is cut into items (row, query tile, run of tokens, some kv heads). An item takes all query heads of its kv heads,
walks its tokens tile by tile and keeps a running softmax. Where a row has more than one run, each item leaves partial
sums, and the last one to finish merges them. How a row is cut into runs depends on nothing but its own length, and heads
know nothing of each other, so a result is the same, bit for bit, in any batch, with any number of threads and wherever
blocks lie.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from .locating import Stream, ask_first, load_scales, locate, ring_size
from .scratch import F32, LOG2_E, NEVER, PAIR_FLOATS, TILE, Scratch, jit, pair_up
from .simd import add, mul, splat
from .simd_memory import (
    address_of,
    atomic_add,
    load,
    load_part,
    peek,
    poke,
    store,
    store_part,
)
from .softmax import adjust, power, rescale, weigh
from .tile import accumulate, score

RUN = 256  # tokens per item, doubled until all query tiles of a row have about MAX_RUNS of them or one each
MAX_RUNS = 64
MORE = 16  # floats behind the sums of a partial result: the first two are maximum and sum of the weights
I32 = np.int32(0)
BF16, F16, E4M3 = np.uint16(0), np.int16(0), np.uint8(0)  # how simd_memory.py knows dtypes that numba lacks
QUERY_KINDS = (F32, BF16, F16)

# fmt: off
INTEGERS = (
    "next_item", "next_thread",  # atomic counters, first in the record
    "query", "key", "value", "table", "lens", "out",  # addresses
    "starts", "first_queries", "sinks", "slopes", "bias", "key_scales", "value_scales",  # the same, or 0: without
    "partials", "done", "scratch",
    "batch", "num_heads", "num_kv_heads", "q_len", "dim", "v_dim", "block_size",  # q_len: the longest if rows are packed
    "q_batch", "q_head", "q_token",  # strides in elements, here and below
    "key_block", "key_token", "key_head",
    "value_block", "value_token", "value_head",
    "key_scales_block", "key_scales_token", "key_scales_head",
    "value_scales_block", "value_scales_token", "value_scales_head",
    "bias_batch", "bias_head", "bias_query", "bias_len",
    "table_row", "table_width",
    "window", "chunk",  # 0: none
    "query_kind",  # index of `QUERY_KINDS`, of queries and output
    "rows_q", "heads",  # queries and kv heads per item
    "element",  # bytes of an element of the cache
)
# fmt: on
REALS = ("scale", "softcap", "unit")  # unit: what the cache holds is read as 1 / unit of it
CALL = np.dtype([(name, np.int64) for name in INTEGERS] + [(name, np.float64) for name in REALS])


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
    rows = call.rows_q * call.heads * (call.num_heads // call.num_kv_heads)
    sizes = _scratch_floats(rows, call.heads, (call.dim + 15) & -16, (call.v_dim + 15) & -16)
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
def _first_visible(call: Any, b: int, position: int) -> int:
    """First key that the query at `position` of a row sees; the last one is at `position` itself."""
    first = 0
    if call.starts != 0:
        first = max(first, np.int64(peek(call.starts, b, I32)))
    if call.window > 0:
        first = max(first, position - call.window + 1)
    if call.chunk > 0:
        first = max(first, position // call.chunk * call.chunk)
    return first


@jit
def _queries(call: Any, b: int) -> tuple[int, int, int]:
    """Of a row: (queries, index of the first one in the output, element index of the first one)."""
    if call.first_queries == 0:
        return call.q_len, b * call.q_len, b * call.q_batch
    first = np.int64(peek(call.first_queries, b, I32))
    return np.int64(peek(call.first_queries, b + 1, I32)) - first, first, first * call.q_token


@jit
def _span(call: Any, b: int, tile: int) -> tuple[int, int, int, int]:
    """Of a query tile: (position of its first query, queries, first visible key, end of the visible keys)."""
    q_len, _, _ = _queries(call, b)
    queries = min(call.rows_q, q_len - tile * call.rows_q)
    position = np.int64(peek(call.lens, b, I32)) - q_len + tile * call.rows_q
    end = max(min(position + queries, call.table_width * call.block_size), 0)
    return position, queries, min(_first_visible(call, b, max(position, 0)), end), end


@jit
def _load_query(call: Any, at: int, target: int, factor: Any, kind: Any) -> None:
    factors = splat(factor)
    for x in range(0, call.dim, 16):
        store(target, x, mul(load_part(call.query, at + x, kind, min(call.dim - x, 16)), factors))


@jit
def _load_queries(call: Any, b: int, tile: int, head: int, queries: int, target: int) -> None:
    """Queries of a tile, scaled, as float32 [kv heads, queries, group, width]; zeros beyond the head dimension."""
    group, width = call.num_heads // call.num_kv_heads, (call.dim + 15) & -16
    factor = np.float32(call.scale / call.softcap if call.softcap > 0 else call.scale * LOG2_E)
    _, _, first = _queries(call, b)
    for h in range(call.heads):
        for r in range(queries * group):
            query, query_head = tile * call.rows_q + r // group, (head + h) * group + r % group
            at = first + query_head * call.q_head + query * call.q_token
            if call.query_kind == 0:
                _load_query(call, at, target, factor, F32)
            elif call.query_kind == 1:
                _load_query(call, at, target, factor, BF16)
            else:
                _load_query(call, at, target, factor, F16)
            target += 4 * width


@jit
def _weigh(call: Any, b: int, tile: int, head: int, at: int, count: int, scratch: Any) -> None:
    """Scores of a tile of tokens from `at` on become weights."""
    position, queries, _, _ = _span(call, b, tile)
    group, v_width = call.num_heads // call.num_kv_heads, (call.v_dim + 15) & -16
    is_plain = call.softcap == 0 and call.slopes == 0 and call.bias == 0 and call.key_scales == 0
    for q in range(queries):
        p = position + q
        first = max(_first_visible(call, b, p) - at, 0) if p >= 0 else count
        end = min(p + 1 - at, count)
        for h in range(call.heads):
            scales = 4 * h * TILE
            for g in range(group):
                row, query_head = (h * queries + q) * group + g, (head + h) * group + g
                scores = scratch.scores + 4 * row * TILE
                if not is_plain:
                    bias = (
                        b * call.bias_batch + query_head * call.bias_head + (tile * call.rows_q + q) * call.bias_query
                    )
                    adjust(call, scores, scratch.key_scales + scales, query_head, bias, at, p, end)
                weigh(row, first, end, v_width, scratch)
                if call.value_scales != 0:
                    rescale(scores, scratch.value_scales + scales, end)


@jit
def _walk(call: Any, b: int, tile: int, head: int, start: int, end: int, scratch: Any, kind: Any) -> None:
    """Running softmax of one query tile over the tokens [start, end) of a row; leaves sums and state in the scratch."""
    _, queries, _, _ = _span(call, b, tile)
    rows = queries * (call.num_heads // call.num_kv_heads)
    for x in range(0, rows * call.heads * ((call.v_dim + 15) & -16), 16):
        store(scratch.sums, x, splat(F32))
    for r in range(rows * call.heads):
        poke(scratch.tops, r, np.float32(NEVER))
        poke(scratch.totals, r, F32)
    _load_queries(call, b, tile, head, queries, scratch.queries)
    pair_up(call, rows, scratch)
    count, places, following = min(TILE, end - start), scratch.places, scratch.places + 8 * 4 * TILE
    stream = locate(call, Stream(0, 0, 0, 0, scratch.extents, ring_size(call.heads) - 1), b, head, start, count, places)
    for at in range(start, end, TILE):
        if call.key_scales != 0:
            load_scales(call, places, count, scratch)
        next_count = min(TILE, end - at - TILE)
        stream = locate(call, stream, b, head, at + TILE, next_count, following)
        if at == start:
            stream = ask_first(stream)
        stream = score(call, stream, places, count, rows, scratch, kind)
        _weigh(call, b, tile, head, at, count, scratch)
        stream = accumulate(call, stream, places + 8 * TILE, count, rows, scratch, kind)
        places, following, count = following, places, next_count


@jit
def _store_row(call: Any, row: int, sums: int, factor: Any, kind: Any) -> None:
    for x in range(0, call.v_dim, 16):
        store_part(call.out, row + x, mul(load(sums, x, F32), splat(factor)), kind, min(call.v_dim - x, 16))


@jit
def _write(call: Any, b: int, tile: int, head: int, r: int, top: float, total: float, sums: int) -> None:
    """Writes row `r` of the tile of a kv head: the sums over the denominator, to which the sink of the head is added."""
    group = call.num_heads // call.num_kv_heads
    query_head = head * group + r % group
    factor = np.float32(1.0) / total if total != 0 else F32  # no key was seen, or the sum is NaN and stays so
    if call.sinks != 0 and total != 0:
        sink = peek(call.sinks, query_head, F32) * np.float32(LOG2_E)
        highest = max(top, sink)
        share = power(top - highest)
        factor = share / (total * share + power(sink - highest))
    _, first, _ = _queries(call, b)
    row = ((first + tile * call.rows_q + r // group) * call.num_heads + query_head) * call.v_dim
    if call.query_kind == 0:
        _store_row(call, row, sums, factor, F32)
    elif call.query_kind == 1:
        _store_row(call, row, sums, factor, BF16)
    else:
        _store_row(call, row, sums, factor, F16)


@jit
def _partial(call: Any, item: int, r: int) -> int:
    """Index of the partial result of row `r` of an item."""
    rows = call.rows_q * call.heads * (call.num_heads // call.num_kv_heads)
    return (item * rows + r) * (((call.v_dim + 15) & -16) + MORE)


@jit
def _leave(call: Any, item: int, rows: int, scratch: Any) -> None:
    """Stores the sums, the maximum and the sum of the weights of an item for the merge."""
    width = (call.v_dim + 15) & -16
    for r in range(rows):
        at = _partial(call, item, r)
        for x in range(0, width, 16):
            store(call.partials, at + x, load(scratch.sums, r * width + x, F32))
        poke(call.partials, at + width, peek(scratch.tops, r, F32))
        poke(call.partials, at + width + 1, peek(scratch.totals, r, F32))


@jit
def _merge(call: Any, b: int, tile: int, head: int, rows: int, item: int, runs: int, sums: int) -> None:
    """Adds up the partial results of all runs of a row, in order, from `item` on, and writes the output rows."""
    width, slices = (call.v_dim + 15) & -16, call.num_kv_heads // call.heads
    for r in range(rows * call.heads):
        top = np.float32(NEVER)
        for run in range(runs):
            top = max(top, peek(call.partials, _partial(call, item + run * slices, r) + width, F32))
        total = F32
        for x in range(0, width, 16):
            store(sums, x, splat(F32))
        for run in range(runs):
            at = _partial(call, item + run * slices, r)
            weight = power(peek(call.partials, at + width, F32) - top)
            total += weight * peek(call.partials, at + width + 1, F32)
            for x in range(0, width, 16):
                store(sums, x, add(load(sums, x, F32), mul(splat(weight), load(call.partials, at + x, F32))))
        _write(call, b, tile, head + r // rows, r % rows, top, total, sums)


@jit
def _run_length(call: Any, b: int) -> int:
    """Tokens of a row that make an item; it depends on the row alone."""
    q_len, _, _ = _queries(call, b)
    tiles, length = (q_len + call.rows_q - 1) // call.rows_q, RUN
    while length * MAX_RUNS < np.int64(peek(call.lens, b, I32)) * tiles:
        length *= 2
    return length


@jit
def _work(call: Any, address: int, kind: Any) -> None:
    """Takes items until none is left. All threads run this at once; `address` is that of the call's counters."""
    group, slices = call.num_heads // call.num_kv_heads, call.num_kv_heads // call.heads
    scratch = _scratch(call, atomic_add(address + 8, 1))
    width = (call.v_dim + 15) & -16
    tiles = (call.q_len + call.rows_q - 1) // call.rows_q
    unit, b, tile, rows, start, end, runs, length = -1, 0, 0, 0, 0, 0, 0, RUN  # a unit is a row's query tile
    first_item = last_item = 0
    while True:
        item = atomic_add(address, 1)
        while item >= last_item:
            unit += 1
            if unit >= call.batch * tiles:
                return
            b, tile = unit // tiles, unit % tiles
            _, queries, start, end = _span(call, b, tile)
            rows, length = queries * group, _run_length(call, b)
            runs = max((end - 1) // length - start // length + 1, 1) if queries > 0 else 0
            first_item, last_item = last_item, last_item + runs * slices
        run, piece = (item - first_item) // slices, (item - first_item) % slices
        head, begin = piece * call.heads, (start // length + run) * length
        _walk(call, b, tile, head, max(start, begin), min(end, begin + length), scratch, kind)
        if runs == 1:
            for r in range(rows * call.heads):
                top, total = peek(scratch.tops, r, F32), peek(scratch.totals, r, F32)
                _write(call, b, tile, head + r // rows, r % rows, top, total, scratch.sums + 4 * r * width)
            continue
        _leave(call, item, rows * call.heads, scratch)
        counter = call.done + 8 * (unit * slices + piece)
        if atomic_add(counter, 1) == runs - 1:
            atomic_add(counter, -runs)  # ready for the next call
            _merge(call, b, tile, head, rows, first_item + piece, runs, scratch.sums)


_FILES = ("kernel.py", "tile.py", "softmax.py", "locating.py", "scratch.py", "simd.py", "simd_memory.py")
_SOURCES = zlib.crc32(b"".join((Path(__file__).parent / name).read_bytes() for name in _FILES))


def entry(kind: Any) -> Callable[[Any], None]:
    """The function to compile for keys and values of one kind (see `simd_memory`); its argument points to a `CALL` record."""
    sources = _SOURCES  # numba's disk cache asks only whether this function has changed, so it has to hold all the code

    def work(pointer: Any) -> None:
        if sources >= 0:
            _work(numba.carray(pointer, (1,), CALL)[0], address_of(pointer), kind)

    return work
