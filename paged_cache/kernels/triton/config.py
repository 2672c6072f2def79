"""Sizes of the attention kernel's tiles, chosen from what its compiled code shows (see tests/kernels/test_aot.py)."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_ROWS = 64  # query rows of a program
TILE_BYTES = 32 * 1024  # K and V of one loop step; two are in flight, which leaves room for two programs per SM


@dataclass(frozen=True)
class Config:
    """How a program is cut."""

    rows: int  # query rows, a power of two
    tile: int  # keys per loop step, a power of two
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that are resident at once


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and number of multiprocessors; zeros of what is no GPU."""
    if device.type != "cuda":
        return 0, 1
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def choose(num_rows: int, k_dim: int, v_dim: int, itemsize: int, dot_dtype: tl.dtype, capability: int) -> Config:
    """The tiles of a call.

    Args:
        num_rows: Query rows (tokens x heads of a group) of the longest row, rounded up to a power of two.
        k_dim, v_dim: Head dimensions of keys and values.
        itemsize: Bytes of a number in the cache.
        dot_dtype: What products are computed in.
        capability: Of the GPU, 90 for 9.0.
    """
    k_pad, v_pad = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    tile = 64
    while tile > 16 and tile * (k_pad + v_pad) * itemsize > TILE_BYTES:
        tile //= 2
    if dot_dtype == tl.float32:  # without tensor cores, more rows would only spill registers
        return Config(16, tile, 8, 3, 2)
    rows = min(MAX_ROWS, 8192 // max(k_pad, v_pad), max(16, num_rows))
    return Config(rows, tile, 4 if rows * max(k_pad, v_pad) <= 8192 else 8, 3, 3 if rows == 16 else 2)
