"""What all parts of the CPU kernel share: constants, the compiler's settings and the memory that a thread works with."""

from typing import Any, NamedTuple

import numba
import numpy as np

from .simd_memory import as_pointer

TILE = 32  # tokens per step of the running softmax
LINE = 64  # bytes of a cache line
STEP = 8  # tokens whose values are summed in registers
LOG2_E = 1.4426950408889634
NEVER = -1e30  # the maximum of no score; finite, so that differences of scores are never NaN
F32, I64 = np.float32(0), np.int64(0)

jit: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False)
inline: Any = numba.njit(nogil=True, error_model="numpy", boundscheck=False, forceinline=True)


class Scratch(NamedTuple):
    """Addresses of what a thread works with; widths are rounded up to 16. `scratch_floats` says how long each part is."""

    queries: int  # float32 [rows, dim], scaled
    sums: int  # float32 [rows, v_dim]
    scores: int  # float32 [rows, TILE], later weights
    tops: int  # float32 [rows]: maximum of the scores so far
    totals: int  # float32 [rows]: sum of the weights so far
    key_scales: int  # float32 [heads, TILE]
    value_scales: int  # likewise
    places: int  # int64 [2, 4, TILE]: addresses of keys and values, indices of their scales; this tile and the next one
    pairs: int  # PAIR [rows]
    extents: int  # of `locating.Stream`


# Two rows of a kv head, which share what is loaded; the last one of an odd number is alone.
PAIR = np.dtype(
    [
        (name, np.int64)
        for name in (
            "key", "value",  # bytes from the first kv head of a token
            "query", "scores", "sums", "query_2", "scores_2", "sums_2",  # addresses of both rows in the scratch
            "is_single", "pace",  # pace: cache lines to ask for with each step
        )
    ]
)  # fmt: skip
PAIR_FLOATS = PAIR.itemsize // 4


@jit
def pair_up(call: Any, rows: int, heads: int, scratch: Scratch) -> Any:
    """Array of the pairs of some kv heads, each with `rows` rows. The first ones of a head ask for as many cache lines as all of them read."""
    width, v_width = 4 * ((call.dim + 15) & -16), 4 * ((call.v_dim + 15) & -16)
    per_head, pace = (rows + 1) // 2, call.element
    pairs = numba.carray(as_pointer(scratch.pairs), (heads * per_head,), PAIR)  # type: ignore[attr-defined]
    while pace > 1 and pace // 2 * per_head >= call.element:
        pace //= 2
    for i in range(len(pairs)):
        pair, head, place = pairs[i], i // per_head, i % per_head
        row, last = head * rows + 2 * place, head * rows + rows - 1
        other = min(row + 1, last)
        pair.key, pair.value = head * call.key_head * call.element, head * call.value_head * call.element
        pair.query, pair.query_2 = scratch.queries + row * width, scratch.queries + other * width
        pair.scores, pair.scores_2 = scratch.scores + 4 * row * TILE, scratch.scores + 4 * other * TILE
        pair.sums, pair.sums_2 = scratch.sums + row * v_width, scratch.sums + other * v_width
        pair.is_single = row == other
        pair.pace = pace if place * pace < call.element else 0
    return pairs
