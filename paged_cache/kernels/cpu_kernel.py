"""The CPU kernel, compiled with numba: keys and values are read in place, block by block, in their own dtype.

The work is cut into items (row, query tile, run of tokens, kv head). An item takes all query heads of its kv head, walks
its tokens tile by tile and keeps a running softmax. Where a row has more than one run, each item leaves partial sums, and
the last one to finish merges them. How a row is cut depends on nothing but its own length, so its result is the same, bit
for bit, in any batch, with any number of threads and wherever its blocks lie.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from paged_cache.kernels.cpu_tile import F32, LOG2_E, NEVER, TILE, accumulate, jit, power, score, weigh
from paged_cache.kernels.simd import add, mul, splat
from paged_cache.kernels.simd_memory import address_of, atomic_add, load, load_part, peek, poke, store, store_part

RUN = 256  # tokens per item, doubled until a row has at most MAX_RUNS of them
MAX_RUNS = 64
MORE = 16  # floats behind the sums of a partial result: the first two are maximum and sum of the weights
I32 = np.int32(0)

# fmt: off
INTEGERS = (
    "next_item",  # atomic counter, first in the record
    "query", "key", "value", "table", "lens", "out", "sinks", "partials", "done",  # addresses
    "batch", "num_heads", "num_kv_heads", "q_len", "dim", "v_dim", "block_size",
    "q_batch", "q_head", "q_token",  # strides in elements, here and below
    "key_block", "key_token", "key_head",
    "value_block", "value_token", "value_head",
    "table_row", "table_width",
    "window", "chunk",  # 0: none
    "is_wide",  # queries and output are float32 although the cache is not
    "rows_q",  # queries per item
    "line",  # elements of the cache per cache line
)
# fmt: on
REALS = ("scale", "softcap")
CALL = np.dtype([(name, np.int64) for name in INTEGERS] + [(name, np.float64) for name in REALS])


@jit
def _first_visible(call: Any, position: int) -> int:
    """First key that the query at `position` sees; the last one is at `position` itself."""
    first = 0
    if call.window > 0:
        first = max(first, position - call.window + 1)
    if call.chunk > 0:
        first = max(first, position // call.chunk * call.chunk)
    return first


@jit
def _span(call: Any, b: int, tile: int) -> tuple[int, int, int, int]:
    """Of a query tile: (position of its first query, queries, first visible key, end of the visible keys)."""
    queries = min(call.rows_q, call.q_len - tile * call.rows_q)
    position = np.int64(peek(call.lens, b, I32)) - call.q_len + tile * call.rows_q
    end = max(min(position + queries, call.table_width * call.block_size), 0)
    return position, queries, min(_first_visible(call, max(position, 0)), end), end


@jit
def _locate(call: Any, b: int, head: int, start: int, count: int, keys: Any, values: Any) -> None:
    """Element index of each of `count` tokens of a row; padded to a multiple of 4 with the last one."""
    t = 0
    while t < count:
        slot = (start + t) // call.block_size
        offset = start + t - slot * call.block_size
        block = np.int64(peek(call.table, b * call.table_row + slot, I32))
        key = block * call.key_block + offset * call.key_token + head * call.key_head
        value = block * call.value_block + offset * call.value_token + head * call.value_head
        for i in range(min(call.block_size - offset, count - t)):
            keys[t] = key + i * call.key_token
            values[t] = value + i * call.value_token
            t += 1
    while t & 3:
        keys[t], values[t] = keys[t - 1], values[t - 1]
        t += 1


@jit
def _load_queries(call: Any, b: int, tile: int, head: int, queries: int, target: int, kind: Any) -> None:
    """Queries of a tile, scaled, as float32 [queries * group, width]; zeros beyond the head dimension."""
    group, width = call.num_heads // call.num_kv_heads, (call.dim + 15) & -16
    factor = call.scale / call.softcap if call.softcap > 0 else call.scale * LOG2_E
    factors = splat(np.float32(factor))
    for r in range(queries * group):
        query, query_head = tile * call.rows_q + r // group, head * group + r % group
        row = b * call.q_batch + query_head * call.q_head + query * call.q_token
        for x in range(0, call.dim, 16):
            part = load_part(call.query, row + x, kind, min(call.dim - x, 16))
            store(target, r * width + x, mul(part, factors))


@jit
def _walk(call: Any, b: int, tile: int, head: int, start: int, end: int, scratch: Any, kind: Any) -> None:
    """Running softmax of one query tile over the tokens [start, end) of a row; leaves sums and state in the scratch."""
    query_rows, scores, sums, state, decay, keys, values, next_values = scratch
    position, queries, _, _ = _span(call, b, tile)
    group = call.num_heads // call.num_kv_heads
    rows = queries * group
    even = rows + (rows & 1)  # the row that is added has no effect, whatever it computes
    sums[:even], decay[:even], query_rows[rows:even] = 0.0, 1.0, 0.0
    state[:rows, 0], state[:rows, 1] = NEVER, 0.0
    if call.is_wide:
        _load_queries(call, b, tile, head, queries, query_rows.ctypes.data, F32)
    else:
        _load_queries(call, b, tile, head, queries, query_rows.ctypes.data, kind)
    count = min(TILE, end - start)
    _locate(call, b, head, start, count, keys, values)
    for at in range(start, end, TILE):
        score(call, keys, count, values, query_rows.ctypes.data, even, scores.ctypes.data, kind)
        for r in range(rows):
            p = position + r // group
            first = max(_first_visible(call, p) - at, 0) if p >= 0 else count
            weigh(call.softcap, r, first, min(p + 1 - at, count), scores, state, decay)
        next_count = min(TILE, end - at - TILE)
        _locate(call, b, head, at + TILE, next_count, keys, next_values)
        accumulate(call, values, count, keys, next_count, scores, even, sums.ctypes.data, decay, kind)
        values, next_values, count = next_values, values, next_count


@jit
def _finish(call: Any, b: int, query: int, head: int, top: float, total: float, sums: int, kind: Any) -> None:
    """Writes one output row: the sums over the denominator, to which the sink of the head is added."""
    factor = np.float32(1.0) / total if total != 0 else F32  # no key was seen, or the sum is NaN and stays so
    if call.sinks != 0 and total != 0:
        sink = peek(call.sinks, head, F32) * np.float32(LOG2_E)
        highest = max(top, sink)
        share = power(top - highest)
        factor = share / (total * share + power(sink - highest))
    factors = splat(np.float32(factor))
    row = ((b * call.q_len + query) * call.num_heads + head) * call.v_dim
    for x in range(0, call.v_dim, 16):
        store_part(call.out, row + x, mul(load(sums, x, F32), factors), kind, min(call.v_dim - x, 16))


@jit
def _write(call: Any, b: int, tile: int, head: int, r: int, top: float, total: float, sums: int, kind: Any) -> None:
    """`_finish` for row `r` of a query tile, in the dtype of the output."""
    group = call.num_heads // call.num_kv_heads
    query, query_head = tile * call.rows_q + r // group, head * group + r % group
    if call.is_wide:
        _finish(call, b, query, query_head, top, total, sums, F32)
    else:
        _finish(call, b, query, query_head, top, total, sums, kind)


@jit
def _partial(call: Any, item: int, r: int) -> int:
    """Index of the partial result of row `r` of an item."""
    rows = call.rows_q * (call.num_heads // call.num_kv_heads)
    return (item * rows + r) * (((call.v_dim + 15) & -16) + MORE)


@jit
def _leave(call: Any, item: int, rows: int, sums: Any, state: Any) -> None:
    """Stores the sums, the maximum and the sum of the weights of an item for the merge."""
    width = sums.shape[1]
    for r in range(rows):
        at = _partial(call, item, r)
        for x in range(0, width, 16):
            store(call.partials, at + x, load(sums.ctypes.data, r * width + x, F32))
        poke(call.partials, at + width, state[r, 0])
        poke(call.partials, at + width + 1, state[r, 1])


@jit
def _merge(call: Any, b: int, tile: int, head: int, rows: int, item: int, runs: int, sums: Any, kind: Any) -> None:
    """Adds up the partial results of all runs of a row, in order, from `item` on, and writes the output rows."""
    width, address = sums.shape[1], sums.ctypes.data
    for r in range(rows):
        top = np.float32(NEVER)
        for run in range(runs):
            at = _partial(call, item + run * call.num_kv_heads, r)
            top = max(top, peek(call.partials, at + width, F32))
        total = F32
        sums[0] = 0.0
        for run in range(runs):
            at = _partial(call, item + run * call.num_kv_heads, r)
            weight = power(peek(call.partials, at + width, F32) - top)
            total += weight * peek(call.partials, at + width + 1, F32)
            for x in range(0, width, 16):
                more = mul(splat(weight), load(call.partials, at + x, F32))
                store(address, x, add(load(address, x, F32), more))
        _write(call, b, tile, head, r, top, total, address, kind)


@jit
def _work(call: Any, address: int, kind: Any) -> None:
    """Takes items until none is left. All threads run this at once; `address` is that of the call's counter."""
    group = call.num_heads // call.num_kv_heads
    most = call.rows_q * group + 1
    sums, state = np.empty((most, (call.v_dim + 15) & -16), np.float32), np.empty((most, 2), np.float32)
    query_rows, scores = np.empty((most, (call.dim + 15) & -16), np.float32), np.empty(most * TILE, np.float32)
    keys, values, more_values = np.empty(TILE, np.int64), np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    scratch = (query_rows, scores, sums, state, np.empty(most, np.float32), keys, values, more_values)
    tiles = (call.q_len + call.rows_q - 1) // call.rows_q
    unit, b, tile, queries, start, end, runs, length = -1, 0, 0, 0, 0, 0, 0, RUN  # a unit is a row's query tile
    first_item = last_item = 0
    while True:
        item = atomic_add(address, 1)
        while item >= last_item:
            unit += 1
            if unit == call.batch * tiles:
                return
            b, tile = unit // tiles, unit % tiles
            _, queries, start, end = _span(call, b, tile)
            length = RUN
            while length * MAX_RUNS < end:
                length *= 2
            runs = max((end - 1) // length - start // length + 1, 1)
            first_item, last_item = last_item, last_item + runs * call.num_kv_heads
        run, head = (item - first_item) // call.num_kv_heads, (item - first_item) % call.num_kv_heads
        begin = (start // length + run) * length
        _walk(call, b, tile, head, max(start, begin), min(end, begin + length), scratch, kind)
        rows = queries * group
        if runs == 1:
            for r in range(rows):
                _write(call, b, tile, head, r, state[r, 0], state[r, 1], sums[r:].ctypes.data, kind)
            continue
        _leave(call, item, rows, sums, state)
        counter = call.done + 8 * (unit * call.num_kv_heads + head)
        if atomic_add(counter, 1) == runs - 1:
            atomic_add(counter, -runs)  # ready for the next call
            _merge(call, b, tile, head, rows, first_item + head, runs, sums, kind)


_FILES = ("cpu_kernel.py", "cpu_tile.py", "simd.py", "simd_memory.py")
_SOURCES = zlib.crc32(b"".join((Path(__file__).parent / name).read_bytes() for name in _FILES))


def entry(kind: Any) -> Callable[[Any], None]:
    """The function to compile for keys and values of one kind (see `simd_memory`); its argument points to a `CALL` record."""
    sources = _SOURCES  # numba's disk cache asks only whether this function has changed, so it has to hold all the code

    def work(pointer: Any) -> None:
        if sources >= 0:
            _work(numba.carray(pointer, (1,), CALL)[0], address_of(pointer), kind)

    return work
