"""The compiled writer of K and V: in torch a layer's write into 8 bits is some thirty operations, and a plain one ten.

From top to bottom: one vector, all vectors of a call, how that is compiled.
"""

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import extending, types
from numba.core import cgutils

from paged_cache.kernels.quantized import LARGEST

from .compiling import compile_worker

# New elements are read as the bits of a float32, or of its upper half; codes are written as integers.
NEW = {torch.float32: (np.int32(0), 0), torch.bfloat16: (np.uint16(0), 16)}
CODES = {torch.int8: np.int8(0), torch.float8_e4m3fn: np.uint8(0)}

# fmt: off
INTEGERS = (
    "new", "cache", "scales", "slots",  # addresses
    "num_tokens", "num_heads", "dim", "block_size", "element",  # element: bytes of one
    "new_token", "new_head", "new_dim",  # strides in elements, here and below
    "cache_block", "cache_slot", "cache_head",
    "scales_block", "scales_slot", "scales_head",
)
# fmt: on
CALL = np.dtype([(name, np.int64) for name in INTEGERS])

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
def _encode(call: Any, new_kind: Any, code_kind: Any, shift: Any, limit: Any, is_int: bool) -> None:
    """All keys, or all values, of a call, as codes and scales."""
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


@_intrinsic
def _move(typingctx: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """Copies bytes between int64 addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = context.get_value_type(types.voidptr)
        to, from_ = (builder.inttoptr(address, pointer) for address in args[:2])
        cgutils.raw_memcpy(builder, to, from_, args[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@_jit
def _copy(call: Any) -> None:
    """All keys, or all values, of a call, as they are."""
    slots = _array(_pointer(call.slots, np.int64(0)), call.num_tokens)
    for token in range(call.num_tokens):
        slot = slots[token]
        if slot < 0:
            continue
        block, offset = slot // call.block_size, slot % call.block_size
        for head in range(call.num_heads):
            at = token * call.new_token + head * call.new_head
            place = block * call.cache_block + offset * call.cache_slot + head * call.cache_head
            _move(call.cache + place * call.element, call.new + at * call.element, call.dim * call.element)


_SOURCE = zlib.crc32(Path(__file__).read_bytes())


def _quantising(new_dtype: torch.dtype, code_dtype: torch.dtype) -> Callable[[Any], None]:
    """The function to compile; its argument points to two `CALL` records."""
    (new_kind, shift), code_kind = NEW[new_dtype], CODES[code_dtype]
    limit, is_int = np.float32(LARGEST[code_dtype]), code_dtype is torch.int8
    source = _SOURCE  # numba's disk cache asks only whether this function has changed, so it has to hold all the code

    def work(pointer: Any) -> None:
        if source >= 0:
            calls = _array(pointer, 2, CALL)
            for i in range(2):
                _encode(calls[i], new_kind, code_kind, shift, limit, is_int)

    return work


def _copying() -> Callable[[Any], None]:
    """The same for what needs no codes."""
    source = _SOURCE

    def work(pointer: Any) -> None:
        if source >= 0:
            calls = _array(pointer, 2, CALL)
            for i in range(2):
                _copy(calls[i])

    return work


@functools.cache
def quantising_writer(new_dtype: torch.dtype, code_dtype: torch.dtype) -> Callable[[int], None]:
    """Writes into a cache of 8 bits, as a C function of the address of two `CALL` records."""
    return compile_worker(_quantising(new_dtype, code_dtype), f"writing {new_dtype} into a {code_dtype} cache")


@functools.cache
def copying_writer() -> Callable[[int], None]:
    """Writes elements as they are, likewise."""
    return compile_worker(_copying(), "writing")
