"""The running softmax over tiles: scores become weights."""

from typing import Any

import numpy as np

from .scratch import F32, LOG2_E, TILE, jit
from .simd import add, exp2, fma, lane_max, lane_sum, lanes, maximum, mul, splat, sub, tanh
from .simd_memory import load, load_part, peek, poke, store


@jit
def power(x: float) -> Any:
    """2 ** x as float32."""
    return lane_max(exp2(splat(np.float32(x))))


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
        poke(scores, t, np.float32(-np.inf if first < end else 0.0))
    if first >= end:
        return
    for t in range(end, last):
        poke(scores, t, np.float32(-np.inf))
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
