"""The two products of a tile: scores of up to `TILE` tokens, and the weighted sum of their values.

Rows are (kv head, query, head of its group); two rows of a kv head share each element that was loaded. Tokens come in the
order of memory, a few of all heads before the next few. Meanwhile what comes next is asked for, see `locating.py`.
"""

from typing import Any

from .locating import Stream, fetch
from .scratch import F32, I64, STEP, inline, jit
from .simd import fma, splat
from .simd_memory import load, load_part, peek, store, store_sums


@inline
def _key(places: int, token: int, pair: Any) -> Any:
    return peek(places, token, I64) + pair.key


@inline
def _score_two(call: Any, stream: Stream, places: int, t: int, pair: Any, kind: Any) -> Stream:
    """Scores of two rows for four tokens."""
    k0, k1 = _key(places, t, pair), _key(places, t + 1, pair)
    k2, k3 = _key(places, t + 2, pair), _key(places, t + 3, pair)
    query, other, pace, whole, n = pair.query, pair.query_2, pair.pace, call.dim & -16, call.dim & 15
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(F32)
    for x in range(0, whole, 16):
        stream = fetch(stream, pace)
        a, b = load(query, x, F32), load(other, x, F32)
        y0, y1, y2, y3 = load(k0, x, kind), load(k1, x, kind), load(k2, x, kind), load(k3, x, kind)
        a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
        b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
    if n:
        a, b = load(query, whole, F32), load(other, whole, F32)
        y0, y1 = load_part(k0, whole, kind, n), load_part(k1, whole, kind, n)
        y2, y3 = load_part(k2, whole, kind, n), load_part(k3, whole, kind, n)
        a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
        b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
    store_sums(pair.scores + 4 * t, pair.scores_2 + 4 * t, a0, a1, a2, a3, b0, b1, b2, b3)
    return stream


@inline
def _score_one(call: Any, stream: Stream, places: int, t: int, pair: Any, kind: Any) -> Stream:
    """Scores of one row for eight tokens."""
    k0, k1 = _key(places, t, pair), _key(places, t + 1, pair)
    k2, k3 = _key(places, t + 2, pair), _key(places, t + 3, pair)
    k4, k5 = _key(places, t + 4, pair), _key(places, t + 5, pair)
    k6, k7 = _key(places, t + 6, pair), _key(places, t + 7, pair)
    query, pace, whole, n = pair.query, pair.pace, call.dim & -16, call.dim & 15
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = splat(F32)
    for x in range(0, whole, 16):
        a = load(query, x, F32)
        stream = fetch(stream, pace)
        a0, a1 = fma(a, load(k0, x, kind), a0), fma(a, load(k1, x, kind), a1)
        a2, a3 = fma(a, load(k2, x, kind), a2), fma(a, load(k3, x, kind), a3)
        stream = fetch(stream, pace)
        a4, a5 = fma(a, load(k4, x, kind), a4), fma(a, load(k5, x, kind), a5)
        a6, a7 = fma(a, load(k6, x, kind), a6), fma(a, load(k7, x, kind), a7)
    if n:
        a = load(query, whole, F32)
        a0, a1 = fma(a, load_part(k0, whole, kind, n), a0), fma(a, load_part(k1, whole, kind, n), a1)
        a2, a3 = fma(a, load_part(k2, whole, kind, n), a2), fma(a, load_part(k3, whole, kind, n), a3)
        a4, a5 = fma(a, load_part(k4, whole, kind, n), a4), fma(a, load_part(k5, whole, kind, n), a5)
        a6, a7 = fma(a, load_part(k6, whole, kind, n), a6), fma(a, load_part(k7, whole, kind, n), a7)
    store_sums(pair.scores + 4 * t, pair.scores + 4 * t + 16, a0, a1, a2, a3, a4, a5, a6, a7)
    return stream


@jit
def score(call: Any, stream: Stream, places: int, count: int, pairs: Any, kind: Any) -> Stream:
    """scores[r, t] = queries[r] . k[t], eight tokens at a time, of which the last ones may be one and the same."""
    for t in range(0, count, 8):
        for i in range(len(pairs)):
            pair = pairs[i]
            if pair.is_single:
                stream = _score_one(call, stream, places, t, pair, kind)
            else:
                stream = _score_two(call, stream, places, t, pair, kind)
                stream = _score_two(call, stream, places, t + 4, pair, kind)
    return stream


@inline
def _add_two(call: Any, stream: Stream, places: int, t: int, end: int, pair: Any, kind: Any) -> Stream:
    """Adds the values of some tokens to the sums of two rows."""
    pace, weights, others = pair.pace, pair.scores, pair.scores_2
    for x in range(0, call.v_dim & -64, 64):
        offset = pair.value + x * call.element
        sums, sums_2 = pair.sums + 4 * x, pair.sums_2 + 4 * x
        a0, a1, a2, a3 = load(sums, 0, F32), load(sums, 16, F32), load(sums, 32, F32), load(sums, 48, F32)
        b0, b1, b2, b3 = load(sums_2, 0, F32), load(sums_2, 16, F32), load(sums_2, 32, F32), load(sums_2, 48, F32)
        for i in range(t, end):
            stream = fetch(stream, pace)
            v = peek(places, i, I64) + offset
            a, b = splat(peek(weights, i, F32)), splat(peek(others, i, F32))
            y0, y1, y2, y3 = load(v, 0, kind), load(v, 16, kind), load(v, 32, kind), load(v, 48, kind)
            a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
            b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
        store(sums, 0, a0), store(sums, 16, a1), store(sums, 32, a2), store(sums, 48, a3)
        store(sums_2, 0, b0), store(sums_2, 16, b1), store(sums_2, 32, b2), store(sums_2, 48, b3)
    for x in range(call.v_dim & -64, call.v_dim & -32, 32):
        offset = pair.value + x * call.element
        sums, sums_2 = pair.sums + 4 * x, pair.sums_2 + 4 * x
        a0, a1, b0, b1 = load(sums, 0, F32), load(sums, 16, F32), load(sums_2, 0, F32), load(sums_2, 16, F32)
        for i in range(t, end):
            stream = fetch(stream, min(pace, 2))
            v = peek(places, i, I64) + offset
            a, b, y0, y1 = (
                splat(peek(weights, i, F32)),
                splat(peek(others, i, F32)),
                load(v, 0, kind),
                load(v, 16, kind),
            )
            a0, a1, b0, b1 = fma(a, y0, a0), fma(a, y1, a1), fma(b, y0, b0), fma(b, y1, b1)
        store(sums, 0, a0), store(sums, 16, a1), store(sums_2, 0, b0), store(sums_2, 16, b1)
    for x in range(call.v_dim & -32, call.v_dim, 16):
        a0, b0 = load(pair.sums, x, F32), load(pair.sums_2, x, F32)
        for i in range(t, end):
            stream = fetch(stream, min(pace, 1))
            y = load_part(peek(places, i, I64) + pair.value, x, kind, min(call.v_dim - x, 16))
            a0, b0 = fma(splat(peek(weights, i, F32)), y, a0), fma(splat(peek(others, i, F32)), y, b0)
        store(pair.sums, x, a0), store(pair.sums_2, x, b0)
    return stream


@inline
def _add_one(call: Any, stream: Stream, places: int, t: int, end: int, pair: Any, kind: Any) -> Stream:
    """Adds the values of some tokens to the sums of a row."""
    pace, weights = pair.pace, pair.scores
    for x in range(0, call.v_dim & -64, 64):
        offset = pair.value + x * call.element
        sums = pair.sums + 4 * x
        a0, a1, a2, a3 = load(sums, 0, F32), load(sums, 16, F32), load(sums, 32, F32), load(sums, 48, F32)
        for i in range(t, end):
            stream = fetch(stream, pace)
            v = peek(places, i, I64) + offset
            a = splat(peek(weights, i, F32))
            a0, a1 = fma(a, load(v, 0, kind), a0), fma(a, load(v, 16, kind), a1)
            a2, a3 = fma(a, load(v, 32, kind), a2), fma(a, load(v, 48, kind), a3)
        store(sums, 0, a0), store(sums, 16, a1), store(sums, 32, a2), store(sums, 48, a3)
    for x in range(call.v_dim & -64, call.v_dim & -32, 32):
        offset = pair.value + x * call.element
        sums = pair.sums + 4 * x
        a0, a1 = load(sums, 0, F32), load(sums, 16, F32)
        for i in range(t, end):
            stream = fetch(stream, min(pace, 2))
            v = peek(places, i, I64) + offset
            a = splat(peek(weights, i, F32))
            a0, a1 = fma(a, load(v, 0, kind), a0), fma(a, load(v, 16, kind), a1)
        store(sums, 0, a0), store(sums, 16, a1)
    for x in range(call.v_dim & -32, call.v_dim, 16):
        a0 = load(pair.sums, x, F32)
        for i in range(t, end):
            stream = fetch(stream, min(pace, 1))
            y = load_part(peek(places, i, I64) + pair.value, x, kind, min(call.v_dim - x, 16))
            a0 = fma(splat(peek(weights, i, F32)), y, a0)
        store(pair.sums, x, a0)
    return stream


@jit
def accumulate(call: Any, stream: Stream, places: int, count: int, pairs: Any, kind: Any) -> Stream:
    """sums[r] += weights[r] @ V, 64 dimensions and `STEP` tokens at a time."""
    for t in range(0, count, STEP):
        end = min(t + STEP, count)
        for i in range(len(pairs)):
            pair = pairs[i]
            if pair.is_single:
                stream = _add_one(call, stream, places, t, end, pair, kind)
            else:
                stream = _add_two(call, stream, places, t, end, pair, kind)
    return stream
