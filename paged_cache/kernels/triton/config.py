"""Sizes of the attention kernel's tiles, chosen from what its compiled code shows (see tests/kernels/test_aot.py)."""

import functools
from dataclasses import dataclass

import torch
import triton

MAX_ROWS = 128  # query rows of a program
TILE_BYTES = 32 * 1024  # K and V of one loop step; two are in flight, which leaves room for two programs per SM


@dataclass(frozen=True)
class Config:
    """How programs are cut."""

    rows: int  # query rows, a power of two
    tile: int  # keys per loop step, a power of two
    num_warps: int
    num_stages: int
    programs_per_sm: int  # that are resident at once


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0), 0 of what is not NVIDIA's, and number of multiprocessors."""
    if device.type != "cuda":
        return 0, 1
    major, minor = torch.cuda.get_device_capability(device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return 10 * major + minor if torch.version.hip is None else 0, num_sms


@functools.cache
def choose(
    num_rows: int, k_dim: int, v_dim: int, query_dtype: torch.dtype, cache_dtype: torch.dtype, capability: int
) -> Config:
    """The tiles of a call.

    Args:
        num_rows: Query rows (tokens x heads of a group) of the longest row, rounded up to a power of two.
        k_dim, v_dim: Head dimensions of keys and values.
        query_dtype, cache_dtype: Of the tensors.
        capability: Of the GPU, 90 for 9.0; 0 for others than NVIDIA's.
    """
    k_pad, v_pad = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    wide = max(k_pad, v_pad)
    has_codes, is_float32 = cache_dtype.itemsize == 1, torch.float32 in (query_dtype, cache_dtype)
    widens = is_float32 and cache_dtype is not torch.float32
    # Codes of 8 bits become 16 on their way through shared memory; what becomes float32 is held in registers as well.
    size, tile = 8 if widens else max(2, cache_dtype.itemsize), 64
    while tile > 16 and tile * (k_pad + v_pad) * size > TILE_BYTES:
        tile //= 2
    if capability == 0:
        return Config(min(64, max(16, num_rows)), tile, 4, 2, 2)
    if is_float32:  # without tensor cores, more rows would only spill registers, as would loads ahead in a wide loop
        return Config(16, tile, 8, 1 if widens and wide > 128 else 3, 2)
    if num_rows <= 16:
        num_warps = 2 if has_codes and wide <= 128 else 4  # what converts 8 bits is issued less often
        return Config(16, tile, num_warps, 3, max(2, min(6, 384 // wide)))
    if num_rows == 32:
        return Config(32, tile, 4, 3, 2)
    if capability // 10 in (9, 10):  # 227 KiB of shared memory
        if wide <= 128:
            return Config(64, 64, 4, 3, 2)
        if v_pad <= 128:
            return Config(min(128, num_rows), 64, 8, 2, 1)
        return Config(32, 32, 4, 3, 2) if has_codes else Config(min(128, num_rows), 32, 8, 3, 1)
    if wide <= 128:
        return Config(min(128, num_rows), 64, 8, 3, 1)
    return Config(64 if v_pad <= 128 and not has_codes else 32, 32, 4, 3, 1)
