"""Paged attention on CPU, compiled with numba: keys and values are read in place, block by block, in their own dtype.

The work is cut into items (row, query tile, run of tokens, kv head). An item takes all query heads of its kv head, walks
its tokens in tiles of `TILE` and keeps a running softmax. Where a row has more than one run, each item leaves partial sums
and the last one to finish merges them. How a row is cut depends on nothing but its own length, so its result is the same,
bit for bit, in any batch, with any number of threads and wherever its blocks lie.

Threads are those of torch: the compiled worker is handed to the OpenMP runtime that torch itself uses, so the two never
compete for cores. benchmarks/README.md has the measurements behind this.
"""

import numba
import numpy as np

from paged_cache.kernels.simd import (
    add,
    address_of,
    atomic_add,
    exp2,
    fma,
    lane_max,
    lane_sum,
    load,
    load_part,
    maximum,
    mul,
    peek,
    poke,
    splat,
    store,
    store_part,
    store_sums,
    sub,
    tanh,
)

TILE = 64  # tokens per step of the running softmax
RUN = 256  # tokens per item, doubled until a row has at most MAX_RUNS of them
MAX_RUNS = 64

LOG2_E = 1.4426950408889634
NEVER = -1e30  # a score that weighs nothing; finite, so that differences of scores are never NaN

# fmt: off
INTEGERS = (
    "next_item",  # atomic counter, first in the record
    "query", "key", "value", "table", "lens", "out", "sinks", "partials", "done",  # addresses
    "batch", "num_heads", "num_kv_heads", "q_len", "dim", "v_dim", "block_size",  # sizes
    "q_batch", "q_head", "q_token",  # strides, in elements
    "key_block", "key_token", "key_head",
    "value_block", "value_token", "value_head",
    "table_row", "table_width",
    "window", "chunk", "io_kind", "rows_q",  # window and chunk: 0 for none; io_kind: dtype of query and output; rows_q: queries per item
)
# fmt: on
REALS = ("scale", "softcap")
CALL = np.dtype([(name, np.int64) for name in INTEGERS] + [(name, np.float64) for name in REALS])

_jit = numba.njit(nogil=True, error_model="numpy", boundscheck=False)


@_jit
def _run_length(end):
    """Tokens per item for a row whose visible tokens end at `end`."""
    length = RUN
    while length * MAX_RUNS < end:
        length *= 2
    return length


@_jit
def _visible(call, position):
    """First key that the query at `position` sees; the last one is `position` itself."""
    first = 0
    if call.window > 0:
        first = max(first, position - call.window + 1)
    if call.chunk > 0 and position >= 0:
        first = max(first, position // call.chunk * call.chunk)
    return first


@_jit
def _span(call, b, tile):
    """Of a query tile: (position of its first query, queries, first visible key, end of the visible keys)."""
    first_query = tile * call.rows_q
    queries = min(call.rows_q, call.q_len - first_query)
    position = np.int64(peek(call.lens, b, np.int32(0))) - call.q_len + first_query
    limit = call.table_width * call.block_size
    return position, queries, _visible(call, max(position, 0)), max(min(position + queries, limit), 0)


@_jit
def _load_queries(call, b, tile, head, queries, group, width, target, kind):
    """Query rows, scaled, as float32 [queries * group, width]; zeros beyond the head dimension."""
    factor = call.scale * LOG2_E
    if call.softcap > 0:
        factor = call.scale / call.softcap
    factors = splat(np.float32(factor))
    for i in range(queries):
        for g in range(group):
            row = b * call.q_batch + (head * group + g) * call.q_head + (tile * call.rows_q + i) * call.q_token
            for x in range(0, call.dim, 16):
                part = load_part(call.query, row + x, kind, min(call.dim - x, 16))
                store(target, (i * group + g) * width + x, mul(part, factors))


@_jit
def _locate(call, b, head, start, count, keys, values):
    """Element index of each of `count` tokens of a row; padded to a multiple of 4 with the last one."""
    t = 0
    while t < count:
        slot = (start + t) // call.block_size
        offset = start + t - slot * call.block_size
        block = np.int64(peek(call.table, b * call.table_row + slot, np.int32(0)))
        key = block * call.key_block + offset * call.key_token + head * call.key_head
        value = block * call.value_block + offset * call.value_token + head * call.value_head
        for i in range(min(call.block_size - offset, count - t)):
            keys[t] = key + i * call.key_token
            values[t] = value + i * call.value_token
            t += 1
    while t & 3:
        keys[t] = keys[t - 1]
        values[t] = values[t - 1]
        t += 1


@_jit
def _scores(base, dim, keys, count, queries, width, rows, scores, kind):
    """scores[r, t] = q[r] . k[t], two rows and four tokens at a time."""
    whole = dim - dim % 16
    zero = splat(np.float32(0.0))
    for t in range(0, count, 4):
        k0, k1, k2, k3 = keys[t], keys[t + 1], keys[t + 2], keys[t + 3]
        for r in range(0, rows, 2):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
            for x in range(0, whole, 16):
                qa, qb = load(queries, r * width + x, np.float32(0)), load(queries, (r + 1) * width + x, np.float32(0))
                y0, y1, y2, y3 = (
                    load(base, k0 + x, kind),
                    load(base, k1 + x, kind),
                    load(base, k2 + x, kind),
                    load(base, k3 + x, kind),
                )
                a0, a1, a2, a3 = fma(qa, y0, a0), fma(qa, y1, a1), fma(qa, y2, a2), fma(qa, y3, a3)
                b0, b1, b2, b3 = fma(qb, y0, b0), fma(qb, y1, b1), fma(qb, y2, b2), fma(qb, y3, b3)
            if whole < dim:
                n = dim - whole
                qa, qb = (
                    load(queries, r * width + whole, np.float32(0)),
                    load(queries, (r + 1) * width + whole, np.float32(0)),
                )
                y0, y1 = load_part(base, k0 + whole, kind, n), load_part(base, k1 + whole, kind, n)
                y2, y3 = load_part(base, k2 + whole, kind, n), load_part(base, k3 + whole, kind, n)
                a0, a1, a2, a3 = fma(qa, y0, a0), fma(qa, y1, a1), fma(qa, y2, a2), fma(qa, y3, a3)
                b0, b1, b2, b3 = fma(qb, y0, b0), fma(qb, y1, b1), fma(qb, y2, b2), fma(qb, y3, b3)
            store_sums(scores, r * TILE + t, a0, a1, a2, a3)
            store_sums(scores, (r + 1) * TILE + t, b0, b1, b2, b3)


@_jit
def _softmax(call, row, first, end, address, scores, state, decay):
    """One row's step of the running softmax: scores[first:end] become weights, the others 0; state is (maximum, sum)."""
    decay[row] = 1.0
    padded = (end + 15) & -16
    for t in range(padded, TILE):
        scores[row * TILE + t] = 0.0
    if end <= first:
        return
    if call.softcap > 0:
        cap = splat(np.float32(call.softcap * LOG2_E))
        for t in range(0, padded, 16):
            at = row * TILE + t
            store(address, at, mul(cap, tanh(load(address, at, np.float32(0)))))
    for t in range(first):
        scores[row * TILE + t] = NEVER
    for t in range(end, padded):
        scores[row * TILE + t] = NEVER
    best = load(address, row * TILE, np.float32(0))
    for t in range(16, padded, 16):
        best = maximum(best, load(address, row * TILE + t, np.float32(0)))
    top = max(state[2 * row], lane_max(best))
    tops = splat(top)
    total = splat(np.float32(0.0))
    for t in range(0, padded, 16):
        weights = exp2(sub(load(address, row * TILE + t, np.float32(0)), tops))
        total = add(total, weights)
        store(address, row * TILE + t, weights)
    old = _power(state[2 * row] - top)
    decay[row] = old
    state[2 * row] = top
    state[2 * row + 1] = state[2 * row + 1] * old + lane_sum(total)


@_jit
def _power(x):
    return lane_max(exp2(splat(np.float32(x))))


@_jit
def _accumulate(base, v_dim, values, count, scores, rows, width, sums, decay, kind):
    """sums[r] = sums[r] * decay[r] + weights[r] @ V: two rows, 64 dimensions at a time."""
    wide = v_dim - v_dim % 64
    for r in range(0, rows, 2):
        da, db = splat(decay[r]), splat(decay[r + 1])
        at, bt = r * width, (r + 1) * width
        for x in range(0, wide, 64):
            a0, a1 = mul(da, load(sums, at + x, np.float32(0))), mul(da, load(sums, at + x + 16, np.float32(0)))
            a2, a3 = mul(da, load(sums, at + x + 32, np.float32(0))), mul(da, load(sums, at + x + 48, np.float32(0)))
            b0, b1 = mul(db, load(sums, bt + x, np.float32(0))), mul(db, load(sums, bt + x + 16, np.float32(0)))
            b2, b3 = mul(db, load(sums, bt + x + 32, np.float32(0))), mul(db, load(sums, bt + x + 48, np.float32(0)))
            for t in range(count):
                wa, wb = splat(scores[r * TILE + t]), splat(scores[(r + 1) * TILE + t])
                v = values[t] + x
                y0, y1, y2, y3 = (
                    load(base, v, kind),
                    load(base, v + 16, kind),
                    load(base, v + 32, kind),
                    load(base, v + 48, kind),
                )
                a0, a1, a2, a3 = fma(wa, y0, a0), fma(wa, y1, a1), fma(wa, y2, a2), fma(wa, y3, a3)
                b0, b1, b2, b3 = fma(wb, y0, b0), fma(wb, y1, b1), fma(wb, y2, b2), fma(wb, y3, b3)
            store(sums, at + x, a0)
            store(sums, at + x + 16, a1)
            store(sums, at + x + 32, a2)
            store(sums, at + x + 48, a3)
            store(sums, bt + x, b0)
            store(sums, bt + x + 16, b1)
            store(sums, bt + x + 32, b2)
            store(sums, bt + x + 48, b3)
        for x in range(wide, v_dim, 16):
            n = min(v_dim - x, 16)
            a0, b0 = mul(da, load(sums, at + x, np.float32(0))), mul(db, load(sums, bt + x, np.float32(0)))
            for t in range(count):
                y0 = load_part(base, values[t] + x, kind, n)
                a0 = fma(splat(scores[r * TILE + t]), y0, a0)
                b0 = fma(splat(scores[(r + 1) * TILE + t]), y0, b0)
            store(sums, at + x, a0)
            store(sums, bt + x, b0)


@_jit
def _finish(call, b, query, head, top, total, sums, kind):
    """Writes one output row: the sums over the denominator, to which the sink of the head is added."""
    if call.sinks != 0 and total > 0:
        sink = peek(call.sinks, head, np.float32(0)) * np.float32(LOG2_E)
        highest = max(top, sink)
        scale = _power(top - highest)
        factor = scale / (total * scale + _power(sink - highest))
    else:
        factor = np.float32(1.0) / total if total > 0 else np.float32(0.0)
    factors = splat(np.float32(factor))
    row = ((b * call.q_len + query) * call.num_heads + head) * call.v_dim
    for x in range(0, call.v_dim, 16):
        value = mul(load(sums, x, np.float32(0)), factors)
        store_part(call.out, row + x, value, kind, min(call.v_dim - x, 16))


@_jit
def _finish_any(call, b, query, head, top, total, sums):
    if call.io_kind == 0:
        _finish(call, b, query, head, top, total, sums, np.float32(0))
    elif call.io_kind == 1:
        _finish(call, b, query, head, top, total, sums, np.uint16(0))
    else:
        _finish(call, b, query, head, top, total, sums, np.int16(0))


@_jit
def _merge(call, b, first_query, queries, head, group, runs, first_item, stride, width, sums_address):
    """Adds up the partial sums of all runs of a row, in order, and writes the output rows."""
    rows = queries * group
    row_size = width + 16
    for r in range(rows):
        top = np.float32(NEVER)
        for run in range(runs):
            at = ((first_item + run * stride) * call.rows_q * group + r) * row_size
            top = max(top, peek(call.partials, at + width, np.float32(0)))
        total = np.float32(0.0)
        for x in range(0, width, 16):
            store(sums_address, x, splat(np.float32(0.0)))
        for run in range(runs):
            at = ((first_item + run * stride) * call.rows_q * group + r) * row_size
            weight = _power(peek(call.partials, at + width, np.float32(0)) - top)
            total += weight * peek(call.partials, at + width + 1, np.float32(0))
            weights = splat(weight)
            for x in range(0, width, 16):
                store(
                    sums_address,
                    x,
                    fma(weights, load(call.partials, at + x, np.float32(0)), load(sums_address, x, np.float32(0))),
                )
        _finish_any(call, b, first_query + r // group, head * group + r % group, top, total, sums_address)


@_jit
def _leave_partials(call, item, rows, group, width, state, sums_address):
    """Stores the sums, maximum and denominator of an item for the merge."""
    row_size = width + 16
    for r in range(rows):
        at = (item * call.rows_q * group + r) * row_size
        for x in range(0, width, 16):
            store(call.partials, at + x, load(sums_address, r * width + x, np.float32(0)))
        poke(call.partials, at + width, state[2 * r])
        poke(call.partials, at + width + 1, state[2 * r + 1])


@_jit
def _walk(call, b, tile, head, start, end, width, v_width, scratch, kind):
    """Running softmax of one query tile over the tokens [start, end) of a row; leaves sums and state in the scratch."""
    queries_array, scores, sums, state, decay, keys, values = scratch
    group = call.num_heads // call.num_kv_heads
    position, queries, _, _ = _span(call, b, tile)
    rows = queries * group
    even = rows + (rows & 1)
    queries_address, scores_address, sums_address = queries_array.ctypes.data, scores.ctypes.data, sums.ctypes.data
    queries_array[rows * width : even * width] = 0.0
    sums[: even * v_width] = 0.0
    decay[rows:even] = 1.0
    for r in range(rows):
        state[2 * r] = NEVER
        state[2 * r + 1] = 0.0
    scores[(even - 1) * TILE : even * TILE] = 0.0
    if call.io_kind == 0:
        _load_queries(call, b, tile, head, queries, group, width, queries_address, np.float32(0))
    elif call.io_kind == 1:
        _load_queries(call, b, tile, head, queries, group, width, queries_address, np.uint16(0))
    else:
        _load_queries(call, b, tile, head, queries, group, width, queries_address, np.int16(0))
    for at in range(start, end, TILE):
        count = min(TILE, end - at)
        _locate(call, b, head, at, count, keys, values)
        _scores(call.key, call.dim, keys, count, queries_address, width, even, scores_address, kind)
        for r in range(rows):
            p = position + r // group
            first = max(_visible(call, p) - at, 0)
            _softmax(call, r, first, min(p + 1 - at, count), scores_address, scores, state, decay)
        if even > rows:
            scores[rows * TILE : even * TILE] = 0.0
        _accumulate(call.value, call.v_dim, values, count, scores, even, v_width, sums_address, decay, kind)


@_jit
def _work(call, address, kind):
    """Takes items until none is left. All threads run this at once."""
    group = call.num_heads // call.num_kv_heads
    width, v_width = (call.dim + 15) & -16, (call.v_dim + 15) & -16
    rows = call.rows_q * group + 1
    sums, state = np.empty(rows * v_width, np.float32), np.empty(2 * rows, np.float32)
    scratch = (
        np.empty(rows * width, np.float32),
        np.empty(rows * TILE, np.float32),
        sums,
        state,
        np.empty(rows, np.float32),
        np.empty(TILE, np.int64),
        np.empty(TILE, np.int64),
    )
    tiles_q = (call.q_len + call.rows_q - 1) // call.rows_q
    unit = -1  # (row, query tile), in order; its items are [first_item, last_item)
    first_item = last_item = 0
    b = tile = runs = start = end = length = 0
    while True:
        item = atomic_add(address, 1)
        while item >= last_item:
            unit += 1
            if unit >= call.batch * tiles_q:
                return
            b, tile = unit // tiles_q, unit % tiles_q
            _, _, start, end = _span(call, b, tile)
            length = _run_length(end)
            runs = max((end - 1) // length - start // length + 1, 1)
            first_item, last_item = last_item, last_item + runs * call.num_kv_heads
        head, run = (item - first_item) % call.num_kv_heads, (item - first_item) // call.num_kv_heads
        lowest = (start // length + run) * length
        _walk(call, b, tile, head, max(start, lowest), min(end, lowest + length), width, v_width, scratch, kind)
        _, queries, _, _ = _span(call, b, tile)
        first_query = tile * call.rows_q
        if runs == 1:
            for r in range(queries * group):
                at = sums.ctypes.data + 4 * r * v_width
                query_head = head * group + r % group
                _finish_any(call, b, first_query + r // group, query_head, state[2 * r], state[2 * r + 1], at)
            continue
        _leave_partials(call, item, queries * group, group, v_width, state, sums.ctypes.data)
        counter = call.done + 8 * (unit * call.num_kv_heads + head)
        if atomic_add(counter, 1) == runs - 1:
            atomic_add(counter, -runs)
            stride = call.num_kv_heads
            _merge(
                call, b, first_query, queries, head, group, runs, first_item + head, stride, v_width, sums.ctypes.data
            )


def float32(pointer):
    """Entry point for float32 keys and values; `pointer` leads to a `CALL` record."""
    call = numba.carray(pointer, (1,), CALL)[0]
    _work(call, address_of(pointer), np.float32(0))


def bfloat16(pointer):
    """Entry point for bfloat16."""
    call = numba.carray(pointer, (1,), CALL)[0]
    _work(call, address_of(pointer), np.uint16(0))


def float16(pointer):
    """Entry point for float16."""
    call = numba.carray(pointer, (1,), CALL)[0]
    _work(call, address_of(pointer), np.int16(0))
