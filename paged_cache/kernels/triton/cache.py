"""K and V into blocks, and blocks to other blocks, in Triton.

From top to bottom: the kernel that writes tokens and what it is made of, its launcher; the kernel that copies blocks, its
launcher. Neither waits for the device. A CUDA graph may capture writes, but no copies: the addresses of their tensors
come from the host.
"""

import functools
import math
from collections import defaultdict
from typing import Any

import torch
import triton
import triton.language as tl

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels.quantized import LARGEST, as_bytes

from .launch import CachedLaunch

TOKENS = 16  # of one program that writes
CHUNK = 8192  # bytes of one program that copies

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
ROUNDER = tl.constexpr(
    12582912.0
)  # 1.5 * 2 ** 23: adding it to a small number leaves its nearest integer in the low bits


@triton.jit
def _to_int8(x):
    """float32 within -128 .. 127 to int8, rounded to nearest even."""
    return (x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _to_e4m3(x):
    """float32 to the bits of float8_e4m3fn, rounded to nearest even, at most 448, NaN as NaN.

    Triton's own conversion needs compute capability 8.9, and the interpreter loses a carry in it.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & MAGNITUDE, 0x43E00000)  # of 448
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # three bits of mantissa are left, bias 7
    small = size.to(tl.float32, bitcast=True)
    subnormal = (small * 512.0 + ROUNDER).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(small < 0.015625, subnormal, normal)
    code = tl.where((bits & MAGNITUDE) > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _write(
    new_ptr,  # [num_tokens, HEADS, DIM]
    cache_ptr,  # [num_blocks, block_size, HEADS, DIM]: uint8 for e4m3
    scales_ptr,  # float32 [num_blocks, block_size, HEADS] or None
    token,  # [TOKENS]
    block,
    offset,
    head,
    is_written,
    stride_token,
    stride_head,
    stride_dim,
    CACHE_BLOCK: tl.constexpr,  # strides
    CACHE_SLOT: tl.constexpr,
    CACHE_HEAD: tl.constexpr,
    SCALES_BLOCK: tl.constexpr,
    SCALES_SLOT: tl.constexpr,
    SCALES_HEAD: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,  # DIM rounded up to a power of two
    LIMIT: tl.constexpr,  # the largest code
):
    dim = tl.arange(0, PAD)
    mask = is_written[:, None] & (dim < DIM)[None, :]
    row = token * stride_token + head * stride_head
    new = tl.load(new_ptr + row[:, None] + dim.to(tl.int64)[None, :] * stride_dim, mask=mask, other=0.0)
    if scales_ptr is not None:
        new = new.to(tl.float32)
        # As integers magnitudes have the same order, and NaN is above all: it reaches the scale.
        largest = tl.max(new.to(tl.int32, bitcast=True) & MAGNITUDE, 1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, LIMIT)
        place = block * SCALES_BLOCK + offset * SCALES_SLOT + head * SCALES_HEAD
        tl.store(scales_ptr + place, scale, mask=is_written)
        new = tl.div_rn(new, tl.where(scale > 0.0, scale, 1.0)[:, None])
        new = _to_int8(new) if cache_ptr.dtype.element_ty == tl.int8 else _to_e4m3(new)
    place = block * CACHE_BLOCK + offset * CACHE_SLOT + head * CACHE_HEAD
    tl.store(cache_ptr + place[:, None] + dim[None, :], new.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_kernel(
    keys_ptr,  # see `_write`
    values_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,  # int64 [num_tokens]: block * BLOCK_SIZE + offset, -1 for none
    num_tokens,
    key_stride_token,
    key_stride_head,
    key_stride_dim,
    value_stride_token,
    value_stride_head,
    value_stride_dim,
    slots_stride,
    KEY: tl.constexpr,  # constants of `_write` for keys and for values
    VALUE: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token * slots_stride, mask=token < num_tokens, other=-1)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if head < KEY_HEADS:
        _write(
            keys_ptr, key_cache_ptr, key_scales_ptr, token, block, offset, head, slot >= 0,
            key_stride_token, key_stride_head, key_stride_dim,
            KEY[0], KEY[1], KEY[2], KEY[3], KEY[4], KEY[5], KEY[6], KEY[7], KEY[8],
        )  # fmt: skip
    if head < VALUE_HEADS:
        _write(
            values_ptr, value_cache_ptr, value_scales_ptr, token, block, offset, head, slot >= 0,
            value_stride_token, value_stride_head, value_stride_dim,
            VALUE[0], VALUE[1], VALUE[2], VALUE[3], VALUE[4], VALUE[5], VALUE[6], VALUE[7], VALUE[8],
        )  # fmt: skip


# TRITON_INTERPRET was set when this file was imported: the kernels run on CPU tensors.
INTERPRETED = not isinstance(_write_kernel, triton.runtime.JITFunction)


def supports(*tensors: torch.Tensor) -> str | None:
    """Why `write_kv` and `copy_blocks` do not take these tensors, or None if they do."""
    others = [str(x.device) for x in tensors if not (x.is_cuda or INTERPRETED)]
    return f"a tensor is on {others[0]}, not on a CUDA device" if others else None


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
    """Writes new K and V into their slots in one launch; see `reference.write_kv`, for calls that `supports` accepts.

    May be captured in a CUDA graph: `slot_mapping` is read when the graph runs. Heads of keys and values may differ in
    number.
    """
    num_tokens = slot_mapping.shape[0]
    if not num_tokens:
        return
    heads = key_cache.shape[2], value_cache.shape[2]
    launch = _writer(
        _constants(key_cache, key_scales), _constants(value_cache, value_scales), *heads, key_cache.shape[1]
    )
    launch(
        (triton.cdiv(num_tokens, TOKENS), max(heads), 1),
        keys.detach(), values.detach(), as_bytes(key_cache), as_bytes(value_cache), key_scales, value_scales,
        slot_mapping, num_tokens, *keys.stride(), *values.stride(), slot_mapping.stride(0),
    )  # fmt: skip


def _constants(cache: torch.Tensor, scales: torch.Tensor | None) -> tuple[Any, ...]:
    dim, strides = cache.shape[3], (0, 0, 0) if scales is None else scales.stride()
    return *cache.stride()[:3], *strides, dim, triton.next_power_of_2(max(dim, 1)), LARGEST.get(cache.dtype, 0.0)


@functools.cache
def _writer(
    key: tuple[Any, ...], value: tuple[Any, ...], key_heads: int, value_heads: int, block_size: int
) -> CachedLaunch:
    constants = {"KEY": key, "VALUE": value, "KEY_HEADS": key_heads, "VALUE_HEADS": value_heads}
    return CachedLaunch(_write_kernel, constants | {"BLOCK_SIZE": block_size, "TOKENS": TOKENS}, enable_fp_fusion=True)


@triton.jit
def _copy_kernel(
    sources_ptr,  # int64 [num_slabs]: addresses
    destinations_ptr,  # likewise
    pairs_ptr,  # int64 [num_pairs, 2]
    SOURCE_STRIDE: tl.constexpr,  # words from block to block
    DESTINATION_STRIDE: tl.constexpr,
    NUM_WORDS: tl.constexpr,  # of a block
    WORD: tl.constexpr,  # an integer type
    ALIGNMENT: tl.constexpr,  # bytes: all blocks begin at multiples
    CHUNK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(2)
    word = tl.program_id(1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    source_ptr = tl.load(sources_ptr + slab).to(tl.pointer_type(WORD))
    destination_ptr = tl.load(destinations_ptr + slab).to(tl.pointer_type(WORD))
    source_ptr = tl.multiple_of(source_ptr, ALIGNMENT) + tl.load(pairs_ptr + 2 * pair) * SOURCE_STRIDE
    destination_ptr = (
        tl.multiple_of(destination_ptr, ALIGNMENT) + tl.load(pairs_ptr + 2 * pair + 1) * DESTINATION_STRIDE
    )
    tl.store(destination_ptr + word, tl.load(source_ptr + word, mask=word < NUM_WORDS), mask=word < NUM_WORDS)


def copy_blocks(sources: list[torch.Tensor], destinations: list[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copies whole blocks of all tensors in one launch per size of a block; see `reference.copy_blocks`.

    Args:
        sources: `[num_blocks, ...]`, blocks without gaps, on the device or in pinned host memory.
        destinations: Likewise, of the same dtypes and strides within a block.
        pairs: int64 `[num_pairs, 2]` on the device.

    Raises:
        InvalidRequestError: The memory of a block has gaps, or source and destination differ in dtype or strides.
    """
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for source, destination in zip(sources, destinations, strict=True):
        addresses = source.data_ptr(), destination.data_ptr()
        groups[_geometry(source, destination, addresses)].append(addresses)
    for (num_bytes, source_stride, destination_stride, alignment), members in groups.items():
        if not num_bytes or not len(pairs):
            continue
        launch = _copier(num_bytes, source_stride, destination_stride, alignment)
        stream = torch.cuda.current_stream(pairs.device) if pairs.is_cuda else None
        from_, to = (_addresses(x, pairs.device, stream) for x in zip(*members, strict=True))
        launch((len(pairs), triton.cdiv(num_bytes, CHUNK), len(members)), from_, to, pairs.contiguous())


def _geometry(source: torch.Tensor, destination: torch.Tensor, addresses: tuple[int, int]) -> tuple[int, int, int, int]:
    """Bytes: of a block, from block to block here and there, alignment of all blocks."""
    shape, strides = source.shape[1:], source.stride()[1:]
    num_bytes = math.prod(shape) * source.itemsize
    span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    same = (shape, strides, source.dtype) == (destination.shape[1:], destination.stride()[1:], destination.dtype)
    if num_bytes and (not same or span * source.itemsize != num_bytes):
        raise InvalidRequestError(
            f"blocks of {source.dtype} {tuple(shape)} with strides {strides} cannot be copied as they lie to blocks of "
            f"{destination.dtype} {tuple(destination.shape[1:])} with strides {destination.stride()[1:]}"
        )
    steps = source.stride(0) * source.itemsize, destination.stride(0) * source.itemsize
    return num_bytes, *steps, math.gcd(16, num_bytes, *steps, *addresses)


@functools.lru_cache(64)  # an address says all that the tensor holds: an entry cannot become wrong
def _addresses(addresses: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """int64 on the device, for use on this stream, which alone waits for them."""
    on_host = torch.tensor(addresses, dtype=torch.int64, pin_memory=stream is not None)
    return on_host.to(device, non_blocking=True)


@functools.cache
def _copier(num_bytes: int, source_stride: int, destination_stride: int, alignment: int) -> CachedLaunch:
    size = min(alignment, 8)
    constants = {
        "SOURCE_STRIDE": source_stride // size,
        "DESTINATION_STRIDE": destination_stride // size,
        "NUM_WORDS": num_bytes // size,
        "WORD": {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[size],
        "ALIGNMENT": alignment,
        "CHUNK": CHUNK // size,
    }
    return CachedLaunch(_copy_kernel, constants, enable_fp_fusion=True)
