"""K and V into their slots on the CPU, by the compiled writers of `writing.py`."""

import ctypes
import struct
import threading

import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import reference
from paged_cache.kernels.reference import copy_blocks  # torch's indexing is as fast

from .writing import CALL, INTEGERS, NEW, copying_writer, quantising_writer

__all__ = ["copy_blocks", "supports", "write_kv"]

_PACK = struct.Struct(f"{2 * len(INTEGERS)}q").pack_into
_NO_STRIDES = (0, 0, 0)


class _Record(threading.local):
    """Each Python thread that calls has a record of its own."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(2 * CALL.itemsize)
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
    """Writes new K and V into their slots; see `reference.write_kv`.

    Raises:
        InvalidRequestError: A slot is beyond the cache.
    """
    slots = slot_mapping if slot_mapping.is_contiguous() else slot_mapping.contiguous()
    _check_slots(slots, key_cache.shape[0] * key_cache.shape[1])
    if key_scales is not None and value_scales is not None:
        if keys.dtype not in NEW or values.dtype is not keys.dtype:
            keys, values = keys.float(), values.float()
        writer = quantising_writer(keys.dtype, key_cache.dtype)
    elif key_cache.stride(3) == value_cache.stride(3) == 1:
        keys, values = _as_stored(keys, key_cache.dtype), _as_stored(values, value_cache.dtype)
        writer = copying_writer()
    else:
        reference.write_kv(keys, values, key_cache, value_cache, slots)
        return
    common = slots.data_ptr(), slots.shape[0]
    _PACK(
        _record.buffer,
        0,
        *_fields(keys, key_cache, key_scales, *common),
        *_fields(values, value_cache, value_scales, *common),
    )
    writer(_record.address)


def _as_stored(new: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the cache holds it, elements of a vector side by side."""
    new = new if new.dtype is dtype else new.to(dtype)
    return new if new.stride(2) == 1 else new.contiguous()


def _fields(
    new: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None, slots: int, num_tokens: int
) -> tuple[int, ...]:
    """A `CALL` record. Heads that lie side by side in both tensors are one, unless each has its scale."""
    _, num_heads, dim = new.shape
    block_size, (block, slot, head, _), (token, new_head, step) = cache.shape[1], cache.stride(), new.stride()
    if scales is None and head == new_head == dim:
        num_heads, dim = 1, num_heads * dim
    return (
        new.data_ptr(), cache.data_ptr(), 0 if scales is None else scales.data_ptr(), slots,
        num_tokens, num_heads, dim, block_size, cache.element_size(),
        token, new_head, step, block, slot, head,
        *(_NO_STRIDES if scales is None else scales.stride()),
    )  # fmt: skip


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    if slots.numel() and int(slots.max()) >= num_slots:
        raise InvalidRequestError(f"slot {int(slots.max())} is beyond the {num_slots} slots of the cache")
