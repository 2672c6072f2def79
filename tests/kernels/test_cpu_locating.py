"""Where the CPU kernel looks for keys and values, and what it asks memory for ahead of time."""

import numpy as np
import pytest

pytest.importorskip("numba")

from paged_cache.kernels.cpu.locating import Stream, fetch, locate, ring_size
from paged_cache.kernels.cpu.record import CALL
from paged_cache.kernels.cpu.scratch import LINE, TILE
from paged_cache.kernels.cpu.units import Unit

BLOCK_SIZE, NUM_HEADS, KEY, VALUE = 4, 2, 1 << 20, 1 << 30
TABLE = np.array([5, 6, 2, 0], np.int32)
ORDERS = {"NHD": (0, 1, 2), "HND": (1, 0, 2)}  # dimensions of a block from the outermost on: 0 token, 1 head, 2 dim


def strides(order: str, dim: int) -> tuple[int, int, int]:
    """Of blocks, tokens and heads, in elements."""
    sizes = [BLOCK_SIZE, NUM_HEADS, dim]
    step, result = 1, [0, 0, 0]
    for dimension in reversed(ORDERS[order]):
        result[dimension] = step
        step *= sizes[dimension]
    return step, result[0], result[1]


@pytest.mark.parametrize(("start", "count"), [(0, 16), (3, 9), (6, 1), (8, 0)])
@pytest.mark.parametrize("heads", [NUM_HEADS, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_a_tile_is_located(order: str, heads: int, start: int, count: int) -> None:
    """Each vector of the tile is in exactly one extent, nothing else is, and there are as few as the order allows."""
    head, element, dims = NUM_HEADS - heads, 4, {KEY: 8, VALUE: 24}
    call = np.zeros(1, CALL)[0]
    call["key"], call["value"], call["table"] = KEY, VALUE, TABLE.ctypes.data
    call["block_size"], call["element"], call["dim"], call["v_dim"] = BLOCK_SIZE, element, 8, 24
    for name, dim in (("key", 8), ("value", 24)):
        call[f"{name}_block"], call[f"{name}_token"], call[f"{name}_head"] = strides(order, dim)
    ring, places = np.zeros((ring_size(heads), 2), np.int64), np.zeros((4, TILE), np.int64)

    stream = Stream(0, 0, 0, 0, ring.ctypes.data, len(ring) - 1)
    unit = Unit(0, 0, 0, 1, 0, start, start + count, heads, 256, 1, 0, 1)
    located = locate(call, stream, unit, head, start, count, places.ctypes.data).located

    tokens = [(TABLE[t // BLOCK_SIZE], t % BLOCK_SIZE) for t in range(start, start + count)]
    wanted: list[int] = []
    for row, (base, dim) in enumerate(dims.items()):
        block_step, token_step, head_step = strides(order, dim)
        vectors = [block * block_step + t * token_step + head * head_step for block, t in tokens]
        addresses = [base + first * element for first in vectors]
        assert places[row, :count].tolist() == addresses
        assert (places[row, count : -(-count // 8) * 8] == addresses[-1:]).all()
        for first in vectors:
            for h in range(heads):
                at = base + (first + h * head_step) * element
                wanted += range(at, at + dim * element)
    assert sorted(byte for at, end in ring[:located] for byte in range(at, end)) == sorted(wanted)
    blocks = len({t // BLOCK_SIZE for t in range(start, start + count)})
    if order == "HND" or heads == NUM_HEADS:
        assert located <= 2 * blocks * (heads if order == "HND" else 1)


def test_a_stream_stays_where_nothing_more_is_known() -> None:
    """It goes from extent to extent, and asks for the end of the last one until there is more."""
    memory, ring = np.zeros(4096, np.uint8), np.zeros((256, 2), np.int64)
    at = memory.ctypes.data
    ring[:2] = [(at, at + 2 * LINE), (at + 8 * LINE, at + 13 * LINE)]
    stream = Stream(at, at + 2 * LINE, 1, 2, ring.ctypes.data, 255)

    visited = []
    for _ in range(5):
        stream = fetch(stream, 2)
        visited.append((stream.at - at) // LINE)
    assert visited == [8, 10, 12, 12, 12]
    assert fetch(stream, 0) == stream
    assert fetch(stream._replace(located=1), 4).at == stream.at
