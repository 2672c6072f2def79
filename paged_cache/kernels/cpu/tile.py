"""The two products of a tile: scores of up to `TILE` tokens, and the weighted sum of their values.

Rows are (kv head, query, head of its group); two rows of a kv head share each element that was loaded. Tokens come in the
order of memory, a few of all heads before the next few. Meanwhile what comes next is asked for, see `locating.py`.
"""

from typing import Any

import numba

from .locating import Stream, fetch
from .scratch import F32, I64, PAIR, STEP, jit
from .simd import fma, splat
from .simd_memory import as_pointer, load, load_part, peek, store, store_sums


@jit
def _key(call: Any, places: int, token: int, pair: Any) -> int:
    return call.key + (peek(places, token, I64) + pair.key) * call.element


@jit
def _multiply_two(query: int, other: int, keys: Any, x: int, sums: Any, kind: Any) -> Any:
    """Adds 16 products to each sum of two rows and four tokens."""
    k0, k1, k2, k3 = keys
    a0, a1, a2, a3, b0, b1, b2, b3 = sums
    a, b = load(query, x, F32), load(other, x, F32)
    y0, y1, y2, y3 = load(k0, x, kind), load(k1, x, kind), load(k2, x, kind), load(k3, x, kind)
    a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
    return a0, a1, a2, a3, fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)


@jit
def _score_two(call: Any, stream: Stream, places: int, t: int, pair: Any, kind: Any) -> Stream:
    """Scores of two rows for four tokens."""
    k0, k1 = _key(call, places, t, pair), _key(call, places, t + 1, pair)
    k2, k3 = _key(call, places, t + 2, pair), _key(call, places, t + 3, pair)
    keys, query, other, dim, pace = (k0, k1, k2, k3), pair.query, pair.query_2, call.dim, pair.pace
    zero = splat(F32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    for x in range(0, dim & -64, 64):
        for i in range(0, 64, 16):
            stream = fetch(stream, pace)
            sums = _multiply_two(query, other, keys, x + i, sums, kind)
    for x in range(dim & -64, dim & -16, 16):
        stream = fetch(stream, pace)
        sums = _multiply_two(query, other, keys, x, sums, kind)
    a0, a1, a2, a3, b0, b1, b2, b3 = sums
    n = dim & 15
    if n:
        x = dim - n
        a, b = load(query, x, F32), load(other, x, F32)
        y0, y1 = load_part(k0, x, kind, n), load_part(k1, x, kind, n)
        y2, y3 = load_part(k2, x, kind, n), load_part(k3, x, kind, n)
        a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
        b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
    store_sums(pair.scores + 4 * t, pair.scores_2 + 4 * t, a0, a1, a2, a3, b0, b1, b2, b3)
    return stream


@jit
def _multiply_one(query: int, keys: Any, x: int, sums: Any, kind: Any) -> Any:
    """Adds 16 products to each sum of a row and four tokens."""
    k0, k1, k2, k3 = keys
    a0, a1, a2, a3 = sums
    a = load(query, x, F32)
    a0, a1 = fma(a, load(k0, x, kind), a0), fma(a, load(k1, x, kind), a1)
    return a0, a1, fma(a, load(k2, x, kind), a2), fma(a, load(k3, x, kind), a3)


@jit
def _score_one(call: Any, stream: Stream, places: int, t: int, pair: Any, kind: Any) -> Stream:
    """Scores of one row for eight tokens."""
    k0, k1 = _key(call, places, t, pair), _key(call, places, t + 1, pair)
    k2, k3 = _key(call, places, t + 2, pair), _key(call, places, t + 3, pair)
    k4, k5 = _key(call, places, t + 4, pair), _key(call, places, t + 5, pair)
    k6, k7 = _key(call, places, t + 6, pair), _key(call, places, t + 7, pair)
    low, high, query, dim, pace = (k0, k1, k2, k3), (k4, k5, k6, k7), pair.query, call.dim, pair.pace
    zero = splat(F32)
    a, b = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for x in range(0, dim & -64, 64):
        for i in range(0, 64, 16):
            stream = fetch(stream, pace)
            a = _multiply_one(query, low, x + i, a, kind)
            stream = fetch(stream, pace)
            b = _multiply_one(query, high, x + i, b, kind)
    for x in range(dim & -64, dim & -16, 16):
        stream = fetch(stream, pace)
        a = _multiply_one(query, low, x, a, kind)
        stream = fetch(stream, pace)
        b = _multiply_one(query, high, x, b, kind)
    (a0, a1, a2, a3), (b0, b1, b2, b3) = a, b
    n = dim & 15
    if n:
        x = dim - n
        q = load(query, x, F32)
        a0, a1 = fma(q, load_part(k0, x, kind, n), a0), fma(q, load_part(k1, x, kind, n), a1)
        a2, a3 = fma(q, load_part(k2, x, kind, n), a2), fma(q, load_part(k3, x, kind, n), a3)
        b0, b1 = fma(q, load_part(k4, x, kind, n), b0), fma(q, load_part(k5, x, kind, n), b1)
        b2, b3 = fma(q, load_part(k6, x, kind, n), b2), fma(q, load_part(k7, x, kind, n), b3)
    store_sums(pair.scores + 4 * t, pair.scores + 4 * t + 16, a0, a1, a2, a3, b0, b1, b2, b3)
    return stream


@jit
def score(call: Any, stream: Stream, places: int, count: int, rows: int, scratch: Any, kind: Any) -> Stream:
    """scores[r, t] = queries[r] . k[t], eight tokens at a time, of which the last ones may be one and the same.

    Meanwhile what comes next is fetched: the keys `call.ahead` tokens on, then the values.
    """
    num_pairs = call.heads * ((rows + 1) // 2)
    pairs = numba.carray(as_pointer(scratch.pairs), (num_pairs,), PAIR)
    for t in range(0, count, STEP):
        for i in range(num_pairs):
            pair = pairs[i]
            if pair.is_single:
                stream = _score_one(call, stream, places, t, pair, kind)
            else:
                stream = _score_two(call, stream, places, t, pair, kind)
                stream = _score_two(call, stream, places, t + 4, pair, kind)
    return stream


@jit
def _add_two(call: Any, stream: Stream, places: int, t: int, end: int, pair: Any, kind: Any) -> Stream:
    """Adds the values of some tokens to the sums of two rows."""
    base, pace, weights, others = call.value + pair.value * call.element, pair.pace, pair.scores, pair.scores_2
    for x in range(0, call.v_dim & -64, 64):
        sums, sums_2 = pair.sums + 4 * x, pair.sums_2 + 4 * x
        a0, a1, a2, a3 = load(sums, 0, F32), load(sums, 16, F32), load(sums, 32, F32), load(sums, 48, F32)
        b0, b1, b2, b3 = load(sums_2, 0, F32), load(sums_2, 16, F32), load(sums_2, 32, F32), load(sums_2, 48, F32)
        for i in range(t, end):
            stream = fetch(stream, pace)
            v = base + (peek(places, i, I64) + x) * call.element
            a, b = splat(peek(weights, i, F32)), splat(peek(others, i, F32))
            y0, y1, y2, y3 = load(v, 0, kind), load(v, 16, kind), load(v, 32, kind), load(v, 48, kind)
            a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
            b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
        store(sums, 0, a0), store(sums, 16, a1), store(sums, 32, a2), store(sums, 48, a3)
        store(sums_2, 0, b0), store(sums_2, 16, b1), store(sums_2, 32, b2), store(sums_2, 48, b3)
    for x in range(call.v_dim & -64, call.v_dim, 16):
        a0, b0 = load(pair.sums, x, F32), load(pair.sums_2, x, F32)
        for i in range(t, end):
            stream = fetch(stream, min(pace, 1))
            y = load_part(base, peek(places, i, I64) + x, kind, min(call.v_dim - x, 16))
            a0, b0 = fma(splat(peek(weights, i, F32)), y, a0), fma(splat(peek(others, i, F32)), y, b0)
        store(pair.sums, x, a0), store(pair.sums_2, x, b0)
    return stream


@jit
def _add_one(call: Any, stream: Stream, places: int, t: int, end: int, pair: Any, kind: Any) -> Stream:
    """Adds the values of some tokens to the sums of a row."""
    base, pace, weights = call.value + pair.value * call.element, pair.pace, pair.scores
    for x in range(0, call.v_dim & -64, 64):
        sums = pair.sums + 4 * x
        a0, a1, a2, a3 = load(sums, 0, F32), load(sums, 16, F32), load(sums, 32, F32), load(sums, 48, F32)
        for i in range(t, end):
            stream = fetch(stream, pace)
            v = base + (peek(places, i, I64) + x) * call.element
            a = splat(peek(weights, i, F32))
            a0, a1 = fma(a, load(v, 0, kind), a0), fma(a, load(v, 16, kind), a1)
            a2, a3 = fma(a, load(v, 32, kind), a2), fma(a, load(v, 48, kind), a3)
        store(sums, 0, a0), store(sums, 16, a1), store(sums, 32, a2), store(sums, 48, a3)
    for x in range(call.v_dim & -64, call.v_dim, 16):
        a0 = load(pair.sums, x, F32)
        for i in range(t, end):
            stream = fetch(stream, min(pace, 1))
            y = load_part(base, peek(places, i, I64) + x, kind, min(call.v_dim - x, 16))
            a0 = fma(splat(peek(weights, i, F32)), y, a0)
        store(pair.sums, x, a0)
    return stream


@jit
def accumulate(call: Any, stream: Stream, places: int, count: int, rows: int, scratch: Any, kind: Any) -> Stream:
    """sums[r] += weights[r] @ V, 64 dimensions and `STEP` tokens at a time; meanwhile what comes next is fetched."""
    num_pairs = call.heads * ((rows + 1) // 2)
    pairs = numba.carray(as_pointer(scratch.pairs), (num_pairs,), PAIR)
    for t in range(0, count, STEP):
        end = min(t + STEP, count)
        for i in range(num_pairs):
            pair = pairs[i]
            if pair.is_single:
                stream = _add_one(call, stream, places, t, end, pair, kind)
            else:
                stream = _add_two(call, stream, places, t, end, pair, kind)
    return stream
