"""What becomes of the sums of an item: output rows, or partial results that the last item of a unit merges."""

from typing import Any

import numpy as np

from .record import BF16, F16
from .scratch import F32, LOG2_E, NEVER, Scratch, jit
from .simd import add, mul, splat
from .simd_memory import load, peek, poke, store, store_part
from .softmax import power
from .units import Unit, queries_of

MORE = 16  # floats behind the sums of a partial result: the first two are maximum and sum of the weights


@jit
def _store_row(call: Any, row: int, sums: int, factor: Any, kind: Any) -> None:
    for x in range(0, call.v_dim, 16):
        store_part(call.out, row + x, mul(load(sums, x, F32), splat(factor)), kind, min(call.v_dim - x, 16))


@jit
def _write(call: Any, unit: Unit, head: int, r: int, top: float, total: float, sums: int) -> None:
    """Writes row `r` of an item: the sums over the denominator, to which the sink of the head is added."""
    group = call.num_heads // call.num_kv_heads
    r, head = r % (unit.queries * group), head + r // (unit.queries * group)
    query_head = head * group + r % group
    factor = np.float32(1.0) / total if total != 0 else F32  # no key was seen, or the sum is NaN and stays so
    if call.sinks != 0 and total != 0:
        sink = peek(call.sinks, query_head, F32) * np.float32(LOG2_E)
        highest = max(top, sink)
        share = power(top - highest)
        factor = share / (total * share + power(sink - highest))
    _, first, _ = queries_of(call, unit.row)
    row = ((first + unit.query + r // group) * call.num_heads + query_head) * call.v_dim
    if call.query_kind == 0:
        _store_row(call, row, sums, factor, F32)
    elif call.query_kind == 1:
        _store_row(call, row, sums, factor, BF16)
    else:
        _store_row(call, row, sums, factor, F16)


@jit
def write(call: Any, unit: Unit, head: int, rows: int, scratch: Scratch) -> None:
    """Writes the output rows of an item that has all tokens of its unit."""
    width = (call.v_dim + 15) & -16
    for r in range(rows):
        top, total = peek(scratch.tops, r, F32), peek(scratch.totals, r, F32)
        _write(call, unit, head, r, top, total, scratch.sums + 4 * r * width)


@jit
def _partial(call: Any, item: int, r: int) -> int:
    """Index of the partial result of row `r` of an item."""
    index: int = (item * call.rows + r) * (((call.v_dim + 15) & -16) + MORE)
    return index


@jit
def leave(call: Any, item: int, rows: int, scratch: Scratch) -> None:
    """Stores the sums, the maximum and the sum of the weights of an item for the merge."""
    width = (call.v_dim + 15) & -16
    for r in range(rows):
        at = _partial(call, item, r)
        for x in range(0, width, 16):
            store(call.partials, at + x, load(scratch.sums, r * width + x, F32))
        poke(call.partials, at + width, peek(scratch.tops, r, F32))
        poke(call.partials, at + width + 1, peek(scratch.totals, r, F32))


@jit
def merge(call: Any, unit: Unit, head: int, rows: int, sums: int) -> None:
    """Adds up the partial results of all runs of a unit, in order, for the kv heads of an item, and writes the output rows."""
    width, slices = (call.v_dim + 15) & -16, call.num_kv_heads // unit.heads
    item = unit.first_item + head // unit.heads
    for r in range(rows):
        top = np.float32(NEVER)
        for run in range(unit.runs):
            top = max(top, peek(call.partials, _partial(call, item + run * slices, r) + width, F32))
        total = F32
        for x in range(0, width, 16):
            store(sums, x, splat(F32))
        for run in range(unit.runs):
            at = _partial(call, item + run * slices, r)
            weight = power(peek(call.partials, at + width, F32) - top)
            total += weight * peek(call.partials, at + width + 1, F32)
            for x in range(0, width, 16):
                store(sums, x, add(load(sums, x, F32), mul(splat(weight), load(call.partials, at + x, F32))))
        _write(call, unit, head, r, top, total, sums)
