"""Where the tokens of a tile lie, and asking memory for them before they are needed.

What a tile needs is a row of extents, contiguous pieces of memory: its keys, then its values, each in the order of addresses. They
wait in a ring, and a stream follows them some kilobytes ahead of the arithmetic, a few cache lines at a time: evenly,
since memory rests while a burst is computed with, and each line by an instruction of its own, since one that strides
from line to line sets off the processor's own prefetching, which leaves the block.
"""

from typing import Any, NamedTuple

import numpy as np

from .scratch import F32, I64, LINE, TILE, jit
from .simd_memory import peek, poke, prefetch
from .units import I32, Unit

AHEAD = 16 * 1024  # bytes between what is asked for and what is computed with


class Stream(NamedTuple):
    """What to ask for next."""

    at: int  # address
    end: int  # of the extent it is in
    next: int  # number of the extent to go on with
    located: int  # number of the first extent that is not known yet
    extents: int  # address of int64 [mask + 1, 2]: first address and end of an extent, at its number & mask
    mask: int


@jit
def ring_size(heads: int) -> int:
    """Room for the extents of two tiles if each vector is one."""
    size = 256
    while size < 4 * TILE * heads:
        size *= 2
    return size


@jit
def _follow(stream: Stream) -> Stream:
    extent = stream.extents + 16 * (stream.next & stream.mask)
    return Stream(
        peek(extent, 0, I64), peek(extent, 1, I64), stream.next + 1, stream.located, stream.extents, stream.mask
    )


@jit
def fetch(stream: Stream, pace: int) -> Stream:
    """Asks for the next `pace` cache lines, 0, 1, 2 or 4; stays in the last extent that is known."""
    if pace == 0:
        return stream
    at = stream.at
    prefetch(at)
    if pace > 1:
        prefetch(at + LINE)
        if pace > 2:
            prefetch(at + 2 * LINE)
            prefetch(at + 3 * LINE)
    at += LINE * pace
    if at < stream.end:
        return Stream(at, stream.end, stream.next, stream.located, stream.extents, stream.mask)
    if stream.next >= stream.located:
        return stream
    followed: Stream = _follow(stream)
    return followed


@jit
def ask_first(stream: Stream) -> Stream:
    """Asks for the first `AHEAD` bytes, or what there is."""
    stream = _follow(stream)
    for _ in range(AHEAD // (4 * LINE)):
        if stream.next == stream.located:
            break
        stream = fetch(stream, 4)
    return stream


@jit
def _add_extents(
    call: Any, stream: Stream, at: int, tokens: int, heads: int, token: int, head: int, dim: int
) -> Stream:
    """Adds the vectors of some tokens and heads; `at` is the address of the first one, `token` and `head` are strides."""
    outer, outer_step, inner, inner_step = tokens, token * call.element, heads, head * call.element
    if outer_step < inner_step:
        outer, outer_step, inner, inner_step = inner, inner_step, outer, outer_step
    length = dim * call.element
    if inner_step == length or inner == 1:
        length, inner = length * inner, 1
        if outer_step == length:
            length, outer = length * outer, 1
    located = stream.located
    for i in range(outer):
        for j in range(inner):
            extent, first = stream.extents + 16 * (located & stream.mask), at + i * outer_step + j * inner_step
            poke(extent, 0, first)
            poke(extent, 1, first + length)
            located += 1
    return Stream(stream.at, stream.end, stream.next, located, stream.extents, stream.mask)


@jit
def _locate_vectors(
    call: Any, stream: Stream, unit: Unit, start: int, count: int, places: int, first: int, steps: Any, dim: int
) -> Stream:
    """Keys or values: `first` is the address in block 0, `steps` are elements from block to block, token and head."""
    block_step, token_step, head_step = steps
    t = 0
    while t < count:
        slot = (start + t) // call.block_size
        offset = start + t - slot * call.block_size
        block = np.int64(peek(call.table, unit.row * call.table_row + slot, I32))
        tokens = min(call.block_size - offset, count - t)
        at = first + (block * block_step + offset * token_step) * call.element
        stream = _add_extents(call, stream, at, tokens, unit.heads, token_step, head_step, dim)
        for i in range(tokens):
            poke(places, t + i, at + i * token_step * call.element)
        t += tokens
    for i in range(count, (count + 7) & -8 if count > 0 else count):
        poke(places, i, peek(places, count - 1, I64))
    return stream


@jit
def locate(call: Any, stream: Stream, unit: Unit, head: int, start: int, count: int, places: int) -> Stream:
    """Writes the places of `count` tokens, the last one up to a multiple of 8, and adds their extents."""
    first, steps = call.key + head * call.key_head * call.element, (call.key_block, call.key_token, call.key_head)
    stream = _locate_vectors(call, stream, unit, start, count, places, first, steps, call.dim)
    if call.key_scales != 0:
        _locate_scales(call, unit, head, start, count, places)
    first = call.value + head * call.value_head * call.element
    steps = (call.value_block, call.value_token, call.value_head)
    located: Stream = _locate_vectors(call, stream, unit, start, count, places + 8 * TILE, first, steps, call.v_dim)
    return located


@jit
def _locate_scales(call: Any, unit: Unit, head: int, start: int, count: int, places: int) -> None:
    for t in range(count):
        slot = (start + t) // call.block_size
        offset = start + t - slot * call.block_size
        block = np.int64(peek(call.table, unit.row * call.table_row + slot, I32))
        key = block * call.key_scales_block + offset * call.key_scales_token + head * call.key_scales_head
        value = block * call.value_scales_block + offset * call.value_scales_token + head * call.value_scales_head
        prefetch(call.key_scales + 4 * key)
        prefetch(call.value_scales + 4 * value)
        poke(places, 2 * TILE + t, key)
        poke(places, 3 * TILE + t, value)


@jit
def load_scales(call: Any, places: int, heads: int, count: int, scratch: Any) -> None:
    """Scales of the tokens of a tile, side by side for each head."""
    unit = np.float32(call.unit)
    for h in range(heads):
        for t in range(count):
            key = peek(places, 2 * TILE + t, I64) + h * call.key_scales_head
            value = peek(places, 3 * TILE + t, I64) + h * call.value_scales_head
            poke(scratch.key_scales, h * TILE + t, peek(call.key_scales, key, F32) * unit)
            poke(scratch.value_scales, h * TILE + t, peek(call.value_scales, value, F32) * unit)
