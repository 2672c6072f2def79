"""One tile of the CPU kernel: scores, softmax and weighted sum of up to `TILE` tokens of one kv head.

Rows are (query, head) pairs; they go two at a time, so that each element that was loaded serves two of them. While a
tile is scored its values are fetched ahead, while its values are summed the keys of the next tile: reading blocks in
random order is then as fast as reading memory in sequence.
"""

from typing import Any

import numba
import numpy as np

from paged_cache.kernels.simd import add, exp2, fma, lane_max, lane_sum, maximum, mul, splat, sub, tanh
from paged_cache.kernels.simd_memory import load, load_part, prefetch, store, store_sums

TILE = 64  # tokens per step of the running softmax
LOG2_E = 1.4426950408889634
NEVER = -1e30  # a score that weighs nothing; finite, so that differences of scores are never NaN
F32 = np.float32(0)

jit: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)


@jit
def power(x: float) -> Any:
    """2 ** x as float32."""
    return lane_max(exp2(splat(np.float32(x))))


@jit
def score(call: Any, keys: Any, count: int, values: Any, queries: int, rows: int, scores: int, kind: Any) -> None:
    """scores[r, t] = q[r] . k[t], four tokens at a time.

    `keys` and `values` hold element indices, padded to a multiple of four; `queries` (float32 [rows, width]) and `scores`
    (float32 [rows, TILE]) are addresses; `rows` is even.
    """
    dim, base, line = call.dim, call.key, call.line
    whole, width = dim & -16, (dim + 15) & -16
    zero = splat(F32)
    for t in range(0, count, 4):
        for i in range(t, t + 4):
            for x in range(0, call.v_dim, line):
                prefetch(call.value, values[i] + x, kind)
        k0, k1, k2, k3 = keys[t], keys[t + 1], keys[t + 2], keys[t + 3]
        for r in range(0, rows, 2):
            qa, qb = r * width, (r + 1) * width
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
            for x in range(0, whole, 16):
                a, b = load(queries, qa + x, F32), load(queries, qb + x, F32)
                y0, y1 = load(base, k0 + x, kind), load(base, k1 + x, kind)
                y2, y3 = load(base, k2 + x, kind), load(base, k3 + x, kind)
                a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
                b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
            if whole < dim:
                n = dim - whole
                a, b = load(queries, qa + whole, F32), load(queries, qb + whole, F32)
                y0, y1 = load_part(base, k0 + whole, kind, n), load_part(base, k1 + whole, kind, n)
                y2, y3 = load_part(base, k2 + whole, kind, n), load_part(base, k3 + whole, kind, n)
                a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
                b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
            store_sums(scores, r * TILE + t, a0, a1, a2, a3)
            store_sums(scores, (r + 1) * TILE + t, b0, b1, b2, b3)


@jit
def weigh(softcap: float, row: int, first: int, end: int, scores: Any, state: Any, decay: Any) -> None:
    """Running softmax of one row: its scores in [first, end) become weights, the other ones 0.

    `state[row]` is (maximum, sum of the weights); `decay[row]` the factor on all that was summed before this tile.
    """
    address, at = scores.ctypes.data, row * TILE
    padded = (end + 15) & -16
    decay[row] = 1.0
    if end <= first:
        scores[at : at + TILE] = 0.0
        return
    if softcap > 0:
        cap = splat(np.float32(softcap * LOG2_E))
        for t in range(at, at + padded, 16):
            store(address, t, mul(cap, tanh(load(address, t, F32))))
    scores[at : at + first] = NEVER
    scores[at + end : at + padded] = NEVER
    scores[at + padded : at + TILE] = 0.0
    best = load(address, at, F32)
    for t in range(at + 16, at + padded, 16):
        best = maximum(best, load(address, t, F32))
    top = max(state[row, 0], lane_max(best))
    tops, total = splat(top), splat(F32)
    for t in range(at, at + padded, 16):
        weights = exp2(sub(load(address, t, F32), tops))
        total = add(total, weights)
        store(address, t, weights)
    decay[row] = power(state[row, 0] - top)
    state[row, 0] = top
    state[row, 1] = state[row, 1] * decay[row] + lane_sum(total)


@jit
def accumulate(
    call: Any,
    values: Any,
    count: int,
    keys: Any,
    next_count: int,
    scores: Any,
    rows: int,
    sums: int,
    decay: Any,
    kind: Any,
) -> None:
    """sums[r] = sums[r] * decay[r] + weights[r] @ V, 64 dimensions at a time.

    `sums` is the address of float32 [rows, width]; `keys` are the `next_count` of the next tile.
    """
    v_dim, base, line = call.v_dim, call.value, call.line
    wide, width = v_dim & -64, (v_dim + 15) & -16
    for t in range(next_count):
        for x in range(0, call.dim, line):
            prefetch(call.key, keys[t] + x, kind)
    for r in range(0, rows, 2):
        da, db = splat(decay[r]), splat(decay[r + 1])
        wa, wb = r * TILE, (r + 1) * TILE
        for x in range(0, wide, 64):
            at, bt = r * width + x, (r + 1) * width + x
            a0, a1 = mul(da, load(sums, at, F32)), mul(da, load(sums, at + 16, F32))
            a2, a3 = mul(da, load(sums, at + 32, F32)), mul(da, load(sums, at + 48, F32))
            b0, b1 = mul(db, load(sums, bt, F32)), mul(db, load(sums, bt + 16, F32))
            b2, b3 = mul(db, load(sums, bt + 32, F32)), mul(db, load(sums, bt + 48, F32))
            for t in range(count):
                v, a, b = values[t] + x, splat(scores[wa + t]), splat(scores[wb + t])
                y0, y1 = load(base, v, kind), load(base, v + 16, kind)
                y2, y3 = load(base, v + 32, kind), load(base, v + 48, kind)
                a0, a1, a2, a3 = fma(a, y0, a0), fma(a, y1, a1), fma(a, y2, a2), fma(a, y3, a3)
                b0, b1, b2, b3 = fma(b, y0, b0), fma(b, y1, b1), fma(b, y2, b2), fma(b, y3, b3)
            store(sums, at, a0), store(sums, at + 16, a1), store(sums, at + 32, a2), store(sums, at + 48, a3)
            store(sums, bt, b0), store(sums, bt + 16, b1), store(sums, bt + 32, b2), store(sums, bt + 48, b3)
        for x in range(wide, v_dim, 16):
            at, bt, n = r * width + x, (r + 1) * width + x, min(v_dim - x, 16)
            a0, b0 = mul(da, load(sums, at, F32)), mul(db, load(sums, bt, F32))
            for t in range(count):
                y0 = load_part(base, values[t] + x, kind, n)
                a0, b0 = fma(splat(scores[wa + t]), y0, a0), fma(splat(scores[wb + t]), y0, b0)
            store(sums, at, a0), store(sums, bt, b0)
