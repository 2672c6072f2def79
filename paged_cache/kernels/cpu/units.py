"""How a call is cut into units and items.

A unit is a tile of the queries of a row. An item is a run of the tokens that a unit sees, with some kv heads. Cuts along
queries and tokens depend on nothing but the row, see `kernel.py`. How many heads go together depends on the room they
need: a decoding row has all of them, which reads memory once and in order, also when a prompt is in the same call.
"""

from typing import Any, NamedTuple

import numpy as np

from .scratch import jit
from .simd_memory import peek

RUN = 256  # tokens per item, doubled until all query tiles of a row have about MAX_RUNS of them or one each
MAX_RUNS = 64
I32 = np.int32(0)


class Unit(NamedTuple):
    """A tile of the queries of a row."""

    number: int  # among the units of the call
    row: int  # -1: there are no more units
    query: int  # its first one, among those of the row
    queries: int
    position: int  # of the first query
    start: int  # the tokens that its queries see
    end: int
    heads: int  # kv heads per item
    run: int  # tokens per item; items end at multiples of it
    runs: int
    first_item: int  # items of a unit: all heads of the first run, all heads of the next run, …
    next_item: int


@jit
def before_all(call: Any) -> Unit:
    """Where `next_unit` begins."""
    return Unit(-1, call.batch, 0, 0, 0, 0, 0, 1, RUN, 0, 0, 0)


@jit
def next_unit(call: Any, unit: Unit) -> Unit:
    """The next one of a call, from the end: prompts stand behind decoding rows and late queries see most, so what takes long begins first."""
    row, query = unit.row, unit.query - call.rows_q
    while query < 0:
        row -= 1
        if row < 0:
            return Unit(unit.number + 1, -1, 0, 0, 0, 0, 0, 1, RUN, 0, unit.next_item, unit.next_item)
        query = (queries_of(call, row)[0] - 1) // call.rows_q * call.rows_q
    q_len, _, _ = queries_of(call, row)
    queries = min(call.rows_q, q_len - query)
    position = np.int64(peek(call.lens, row, I32)) - q_len + query
    end = max(min(position + queries, call.table_width * call.block_size), 0)
    start, run, heads = min(first_visible(call, row, max(position, 0)), end), _run_length(call, row, q_len), call.heads
    while heads > 1 and (call.num_kv_heads % heads or heads * queries * call.num_heads > call.rows * call.num_kv_heads):
        heads -= 1
    runs = max((end - 1) // run - start // run + 1, 1)
    next_item = unit.next_item + runs * (call.num_kv_heads // heads)
    return Unit(unit.number + 1, row, query, queries, position, start, end, heads, run, runs, unit.next_item, next_item)


@jit
def queries_of(call: Any, row: int) -> tuple[int, int, int]:
    """Of a row: (queries, index of the first one in the output, element index of the first one)."""
    if call.first_queries == 0:
        return call.q_len, row * call.q_len, row * call.q_batch
    first, end = int(peek(call.first_queries, row, I32)), int(peek(call.first_queries, row + 1, I32))
    return end - first, first, first * call.q_token


@jit
def first_visible(call: Any, row: int, position: int) -> int:
    """First key that the query at `position` of a row sees; the last one is at `position` itself."""
    first = 0
    if call.starts != 0:
        first = max(first, int(peek(call.starts, row, I32)))
    if call.window > 0:
        first = max(first, position - call.window + 1)
    if call.chunk > 0:
        first = max(first, position // call.chunk * call.chunk)
    return first


@jit
def _run_length(call: Any, row: int, q_len: int) -> int:
    """Tokens of a row that make an item; it depends on the row alone."""
    tiles, length = (q_len + call.rows_q - 1) // call.rows_q, RUN
    while length * MAX_RUNS < np.int64(peek(call.lens, row, I32)) * tiles:
        length *= 2
    return length
