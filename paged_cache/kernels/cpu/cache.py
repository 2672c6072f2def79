"""K and V into an 8-bit cache on the CPU, compiled with numba: in torch a layer's write is some thirty operations.

From top to bottom: one vector, all vectors of a call, how that is compiled, the public function.
"""

import ctypes
import functools
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import extending, types

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import reference
from paged_cache.kernels.quantized import LARGEST
from paged_cache.kernels.reference import copy_blocks  # torch's indexing is as fast

from .compiling import compile_worker

__all__ = ["copy_blocks", "supports", "write_kv"]

# New elements are read as the bits of a float32, or of its upper half; codes are written as integers.
_NEW = {torch.float32: (np.int32(0), 0), torch.bfloat16: (np.uint16(0), 16)}
_CODES = {torch.int8: np.int8(0), torch.float8_e4m3fn: np.uint8(0)}

# fmt: off
_INTEGERS = (
    "new", "cache", "scales", "slots",  # addresses
    "num_tokens", "num_heads", "dim", "block_size",
    "new_token", "new_head", "new_dim",  # strides in elements, here and below
    "cache_block", "cache_slot", "cache_head",
    "scales_block", "scales_slot", "scales_head",
)
# fmt: on
_CALL = np.dtype([(name, np.int64) for name in _INTEGERS])
_PACK = struct.Struct(f"{2 * len(_INTEGERS)}q").pack_into

_MAGNITUDE, _INFINITY, _OF_448 = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x43E00000)
_ROUNDER = np.float32(12582912)  # 1.5 * 2 ** 23: added to a small number it leaves the nearest integer in the low bits
_jit: Any = numba.njit(error_model="numpy", forceinline=True)
_intrinsic: Any = extending.intrinsic  # what it makes is called without `typingctx`
_array: Any = numba.carray  # type: ignore[attr-defined]


@_intrinsic
def _pointer(typingctx: Any, address: Any, kind: Any) -> Any:
    """The C pointer to elements of the type of `kind` at an int64 address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(types.int64, kind), codegen  # type: ignore[no-untyped-call]


@_jit
def _round(x: Any) -> Any:
    """float32 to the nearest integer, ties to even, in the low bits."""
    return np.float32(x + _ROUNDER).view(np.int32)


@_jit
def _to_e4m3(x: Any) -> Any:
    """float32 to the bits of float8_e4m3fn, rounded to nearest even, at most 448, NaN as NaN."""
    bits = np.float32(x).view(np.int32)
    size = min(bits & _MAGNITUDE, _OF_448)
    normal = ((size + np.int32(0x7FFFF) + ((size >> 20) & 1)) >> 20) - (120 << 3)  # three bits of mantissa are left
    subnormal = _round(np.int32(size).view(np.float32) * np.float32(512)) & 0xF
    code = normal if size >= np.int32(0x3C800000) else subnormal  # 2 ** -6
    code = code if (bits & _MAGNITUDE) <= _INFINITY else 0x7F
    return code | ((bits >> 24) & 0x80)


@_jit
def _quantise(new: Any, step: int, codes: Any, dim: int, shift: Any, limit: Any, is_int: bool) -> Any:
    """One vector; returns its scale."""
    largest = np.int32(0)  # as integers magnitudes have the same order, and NaN is above all: it reaches the scale
    for i in range(dim):
        largest = max(largest, (np.int32(new[i * step]) << shift) & _MAGNITUDE)
    scale = np.int32(largest).view(np.float32) / limit
    divisor = scale if scale > np.float32(0) else np.float32(1)
    for i in range(dim):
        x = np.int32(np.int32(new[i * step]) << shift).view(np.float32) / divisor
        codes[i] = _round(x) if is_int else _to_e4m3(x)
    return scale


@_jit
def _write(call: Any, new_kind: Any, code_kind: Any, shift: Any, limit: Any, is_int: bool) -> None:
    """All keys, or all values, of a call."""
    new, cache = _pointer(call.new, new_kind), _pointer(call.cache, code_kind)
    scales, slots = _pointer(call.scales, np.float32(0)), _pointer(call.slots, np.int64(0))
    reach = 1 << 40  # no array bounds: addresses and strides say where things are
    new, cache, scales = _array(new, reach), _array(cache, reach), _array(scales, reach)
    slots = _array(slots, call.num_tokens)
    for token in range(call.num_tokens):
        slot = slots[token]
        if slot < 0:
            continue
        block, offset = slot // call.block_size, slot % call.block_size
        for head in range(call.num_heads):
            row = new[token * call.new_token + head * call.new_head :]
            place = block * call.cache_block + offset * call.cache_slot + head * call.cache_head
            codes = cache[place : place + call.dim]
            if call.new_dim == 1:  # LLVM makes vectors of this one
                scale = _quantise(row, 1, codes, call.dim, shift, limit, is_int)
            else:
                scale = _quantise(row, call.new_dim, codes, call.dim, shift, limit, is_int)
            scales[block * call.scales_block + offset * call.scales_slot + head * call.scales_head] = scale


_SOURCE = zlib.crc32(Path(__file__).read_bytes())


def _entry(new_dtype: torch.dtype, code_dtype: torch.dtype) -> Callable[[Any], None]:
    """The function to compile; its argument points to two `_CALL` records."""
    (new_kind, shift), code_kind = _NEW[new_dtype], _CODES[code_dtype]
    limit, is_int = np.float32(LARGEST[code_dtype]), code_dtype is torch.int8
    source = _SOURCE  # numba's disk cache asks only whether this function has changed, so it has to hold all the code

    def work(pointer: Any) -> None:
        if source >= 0:
            calls = _array(pointer, 2, _CALL)
            for i in range(2):
                _write(calls[i], new_kind, code_kind, shift, limit, is_int)

    return work


@functools.cache
def _compile(new_dtype: torch.dtype, code_dtype: torch.dtype) -> Callable[[int], None]:
    """The worker as a C function."""
    return compile_worker(_entry(new_dtype, code_dtype), f"writing {new_dtype} into a {code_dtype} cache")


class _Record(threading.local):
    """Each Python thread that calls has a record of its own."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(2 * _CALL.itemsize)
        self.address = ctypes.addressof(self.buffer)


_record = _Record()


def supports(*tensors: torch.Tensor) -> str | None:
    """Why `write_kv` and `copy_blocks` do not take these tensors, or None if they do."""
    return None if all(x.is_cpu for x in tensors) else "a tensor is not on the CPU"


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Writes new K and V into their slots; see `reference.write_kv`. A cache of 16 bits or more is torch's matter."""
    if key_scales is None or value_scales is None:
        reference.write_kv(keys, values, key_cache, value_cache, slot_mapping)
        return
    if keys.dtype not in _NEW or values.dtype is not keys.dtype:
        keys, values = keys.float(), values.float()
    slots = slot_mapping if slot_mapping.is_contiguous() else slot_mapping.contiguous()
    _check_slots(slots, key_cache.shape[0] * key_cache.shape[1])
    block_size, common = key_cache.shape[1], (slots.data_ptr(), slots.shape[0])
    _PACK(
        _record.buffer, 0,
        keys.data_ptr(), key_cache.data_ptr(), key_scales.data_ptr(), *common, *keys.shape[1:], block_size,
        *keys.stride(), *key_cache.stride()[:3], *key_scales.stride(),
        values.data_ptr(), value_cache.data_ptr(), value_scales.data_ptr(), *common, *values.shape[1:], block_size,
        *values.stride(), *value_cache.stride()[:3], *value_scales.stride(),
    )  # fmt: skip
    _compile(keys.dtype, key_cache.dtype)(_record.address)


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    if slots.numel() and int(slots.max()) >= num_slots:
        raise InvalidRequestError(f"slot {int(slots.max())} is beyond the {num_slots} slots of the cache")
