"""One tile of the CPU kernel: scores, softmax and weighted sum of up to `TILE` tokens of some kv heads.

Rows are (kv head, query, head of its group); two rows of a kv head share each element that was loaded, the last one of
an odd number goes with itself. Tokens come in the order of memory, a few of all heads before the next few, so that every
page is visited once. Memory is asked ahead for the values of a tile and the keys of the next one, evenly over the time.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from .simd import add, exp2, fma, lane_max, lane_sum, lanes, maximum, mul, splat, sub, tanh
from .simd_memory import load, load_part, peek, poke, prefetch, store, store_sums

TILE = 32  # tokens per step of the running softmax
STEP = 8  # tokens whose values are summed in registers
LOG2_E = 1.4426950408889634
NEVER = -1e30  # a score that weighs nothing; finite, so that differences of scores are never NaN
F32, I64 = np.float32(0), np.int64(0)

jit: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)


class Scratch(NamedTuple):
    """Addresses of what a thread works with; widths are rounded up to 16. `scratch_floats` says how long each part is."""

    queries: int  # float32 [rows, dim], scaled
    sums: int  # float32 [rows, v_dim]
    scores: int  # float32 [rows, TILE], later weights
    tops: int  # float32 [rows]: maximum of the scores so far
    totals: int  # float32 [rows]: sum of the weights so far
    key_scales: int  # float32 [heads, TILE]
    value_scales: int  # likewise
    places: int  # int64 [2, 4, TILE]: element index of keys, values and their scales; this tile and the next one


@jit
def power(x: float) -> Any:
    """2 ** x as float32."""
    return lane_max(exp2(splat(np.float32(x))))


@jit
def _fetch(
    base: int, places: int, token: int, head: int, pairs: int, end: int, heads: int, step: int, lines: Any, kind: Any
) -> tuple[int, int]:
    """Asks for the next `pairs` of (token, head), from the given ones on and none of `end`; returns where to go on.

    Heads go faster than tokens, so that addresses rise: in any other order memory gives half as much. `step` is the stride of
    heads, `lines` the cache lines of a vector and the elements of each.
    """
    count, line = lines
    for _ in range(pairs):
        if token < end:
            at = peek(places, token, I64) + head * step
            for _ in range(count):
                prefetch(base, at, kind)
                at += line
        head += 1
        if head == heads:
            token, head = token + 1, 0
    return token, head


@jit
def score(
    call: Any, places: int, count: int, following: int, next_count: int, rows: int, scratch: Any, kind: Any
) -> None:
    """scores[r, t] = queries[r] . k[t], four tokens at a time, of which the last ones may be one and the same.

    Meanwhile the values of the tile are fetched, and half the keys of the next one: scoring takes two thirds of the time.
    """
    dim, heads, base, line, queries = call.dim, call.heads, call.key, call.line, scratch.queries
    whole, width, values = dim & -16, (dim + 15) & -16, places + TILE * 8
    key_lines, value_lines = ((dim + line - 1) // line, line), ((call.v_dim + line - 1) // line, line)
    value, value_head, key, key_head = 0, 0, 0, 0
    zero = splat(F32)
    for t in range(0, count, 4):
        for h in range(heads):
            value, value_head = _fetch(
                call.value, values, value, value_head, 4, count, heads, call.value_head, value_lines, kind
            )
            key, key_head = _fetch(base, following, key, key_head, 2, next_count, heads, call.key_head, key_lines, kind)
            k0, k1 = peek(places, t, I64) + h * call.key_head, peek(places, t + 1, I64) + h * call.key_head
            k2, k3 = peek(places, t + 2, I64) + h * call.key_head, peek(places, t + 3, I64) + h * call.key_head
            for r in range(h * rows, (h + 1) * rows, 2):
                s = min(r + 1, (h + 1) * rows - 1)
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
                for x in range(0, whole, 16):
                    a, b = load(queries, r * width + x, F32), load(queries, s * width + x, F32)
                    y0, y1 = load(base, k0 + x, kind), load(base, k1 + x, kind)
                    y2, y3 = load(base, k2 + x, kind), load(base, k3 + x, kind)
                    a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
                    b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
                if whole < dim:
                    n = dim - whole
                    a, b = load(queries, r * width + whole, F32), load(queries, s * width + whole, F32)
                    y0, y1 = load_part(base, k0 + whole, kind, n), load_part(base, k1 + whole, kind, n)
                    y2, y3 = load_part(base, k2 + whole, kind, n), load_part(base, k3 + whole, kind, n)
                    a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
                    b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
                store_sums(scratch.scores, r * TILE + t, s * TILE + t, a0, a1, a2, a3, b0, b1, b2, b3)


@jit
def adjust(call: Any, scores: int, scales: int, head: int, bias: int, at: int, position: int, end: int) -> None:
    """Scores of a row as the softmax takes them, in units of log 2: key scales, softcap, ALiBi and position bias.

    `scores` and `scales` are addresses, those of the token at `at`, of which `end` count; `bias` is the element index of
    the bias of the row's query, at `position`, on token 0.
    """
    cap, log2_e = splat(np.float32(call.softcap * LOG2_E)), splat(np.float32(LOG2_E))
    slope = peek(call.slopes, head, F32) * np.float32(LOG2_E) if call.slopes != 0 else F32
    for t in range(0, end, 16):
        x = load(scores, t, F32)
        if call.key_scales != 0:
            x = mul(x, load(scales, t, F32))
        if call.softcap > 0:
            x = mul(cap, tanh(x))
        if call.slopes != 0:
            x = fma(splat(slope), add(lanes(), splat(np.float32(at + t - position))), x)
        if call.bias != 0:
            x = fma(log2_e, load_part(call.bias, bias + at + t, F32, min(end, call.bias_len - at) - t), x)
        store(scores, t, x)


@jit
def weigh(row: int, first: int, end: int, width: int, scratch: Any) -> None:
    """Running softmax of one row: its scores in [first, end) become weights, the other ones 0."""
    scores = scratch.scores + row * TILE * 4
    last = (end + 15) & -16
    for t in range(first if first < end else TILE):
        poke(scores, t, np.float32(NEVER if first < end else 0.0))
    if first >= end:
        return
    for t in range(end, last):
        poke(scores, t, np.float32(NEVER))
    best = load(scores, 0, F32)
    for t in range(16, last, 16):
        best = maximum(best, load(scores, t, F32))
    old = peek(scratch.tops, row, F32)
    top = max(old, lane_max(best))
    tops, total = splat(top), splat(F32)
    for t in range(0, last, 16):
        weights = exp2(sub(load(scores, t, F32), tops))
        total = add(total, weights)
        store(scores, t, weights)
    for t in range(last, TILE, 16):
        store(scores, t, splat(F32))
    before = peek(scratch.totals, row, F32)
    if top != old:
        decay = power(old - top)
        before *= decay
        poke(scratch.tops, row, top)
        for x in range(row * width, (row + 1) * width, 16):
            store(scratch.sums, x, mul(splat(decay), load(scratch.sums, x, F32)))
    poke(scratch.totals, row, before + lane_sum(total))


@jit
def rescale(scores: int, scales: int, count: int) -> None:
    """Weights of a row times the scales of the values."""
    for t in range(0, count, 16):
        store(scores, t, mul(load(scores, t, F32), load(scales, t, F32)))


@jit
def accumulate(
    call: Any, places: int, count: int, following: int, next_count: int, rows: int, scratch: Any, kind: Any
) -> None:
    """sums[r] += weights[r] @ V, 64 dimensions and `STEP` tokens at a time; the other half of the next keys is fetched."""
    v_dim, heads, base, line, sums, scores = call.v_dim, call.heads, call.value, call.line, scratch.sums, scratch.scores
    wide, width, values = v_dim & -64, (v_dim + 15) & -16, places + TILE * 8
    key, key_head, lines = count // 2, 0, ((call.dim + line - 1) // line, line)
    for t in range(0, count, STEP):
        end = min(t + STEP, count)
        for h in range(heads):
            offset = h * call.value_head
            key, key_head = _fetch(
                call.key, following, key, key_head, STEP // 2, next_count, heads, call.key_head, lines, kind
            )
            for r in range(h * rows, (h + 1) * rows, 2):
                s = min(r + 1, (h + 1) * rows - 1)
                for x in range(0, wide, 64):
                    at, bt = r * width + x, s * width + x
                    a0, a1 = load(sums, at, F32), load(sums, at + 16, F32)
                    a2, a3 = load(sums, at + 32, F32), load(sums, at + 48, F32)
                    b0, b1 = load(sums, bt, F32), load(sums, bt + 16, F32)
                    b2, b3 = load(sums, bt + 32, F32), load(sums, bt + 48, F32)
                    for i in range(t, end):
                        v = peek(values, i, I64) + offset + x
                        a, b = splat(peek(scores, r * TILE + i, F32)), splat(peek(scores, s * TILE + i, F32))
                        y0, y1 = load(base, v, kind), load(base, v + 16, kind)
                        y2, y3 = load(base, v + 32, kind), load(base, v + 48, kind)
                        a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
                        b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
                    store(sums, at, a0), store(sums, at + 16, a1), store(sums, at + 32, a2), store(sums, at + 48, a3)
                    store(sums, bt, b0), store(sums, bt + 16, b1), store(sums, bt + 32, b2), store(sums, bt + 48, b3)
                for x in range(wide, v_dim, 16):
                    at, bt, n = r * width + x, s * width + x, min(v_dim - x, 16)
                    a0, b0 = load(sums, at, F32), load(sums, bt, F32)
                    for i in range(t, end):
                        y0 = load_part(base, peek(values, i, I64) + offset + x, kind, n)
                        a0 = fma(splat(peek(scores, r * TILE + i, F32)), y0, a0)
                        b0 = fma(splat(peek(scores, s * TILE + i, F32)), y0, b0)
                    store(sums, at, a0), store(sums, bt, b0)
