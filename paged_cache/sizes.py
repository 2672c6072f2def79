"""How large a pool is: checks and conversions of what callers say."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .compat import logger
from .errors import InvalidRequestError
from .machine_memory import free_memory, total_memory
from .wording import format_bytes

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {f"{unit}I": 1024**i for i, unit in enumerate("KMGT", start=1)}


KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
"""Names for the dtype in which a pool stores K and V; None is the one in which they come back."""


def check_dtypes(dtype: Any, kv_dtype: Any, default: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtype in which K and V come back, and the one in which they are stored.

    Args:
        dtype: A floating point dtype; None for `default`. One of 8 bits says how K and V are stored, as `kv_dtype` does.
        kv_dtype: A name or dtype of `KV_DTYPES`, None for "auto".
        default: The model's.

    Raises:
        InvalidRequestError: One of the two is none of these, or they contradict each other.
    """
    if kv_dtype not in [None, *KV_DTYPES, *KV_DTYPES.values()]:
        raise InvalidRequestError(f"kv_dtype is {kv_dtype!r}; it has to be one of {', '.join(map(repr, KV_DTYPES))}.")
    stored = KV_DTYPES[kv_dtype] if isinstance(kv_dtype, str) else kv_dtype
    if dtype is not None and dtype in KV_DTYPES.values():
        if kv_dtype is not None and stored is not dtype:
            raise InvalidRequestError(
                f"dtype={dtype} and kv_dtype={kv_dtype!r} contradict each other; give one of them."
            )
        dtype, stored = None, dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise InvalidRequestError(
            f"dtype is {dtype!r}; it has to be a floating point torch.dtype of 16 bits or more, torch.int8, "
            "torch.float8_e4m3fn, or None."
        )
    dtype = dtype or default
    return dtype, stored or dtype


def check_block_size(block_size: Any) -> None:
    """Raises `InvalidRequestError` unless it is a power of two."""
    if not isinstance(block_size, int) or block_size < 1 or block_size & (block_size - 1):
        raise InvalidRequestError(f"block_size is {block_size!r}; it has to be a power of two, such as 16.")


def num_blocks_for(num_blocks: Any, memory: Any, block_nbytes: Mapping[Any, int]) -> int:
    """The size of a pool from the one of `num_blocks` and `memory` that is given.

    Args:
        num_blocks: Blocks.
        memory: As `parse_memory` takes it: bytes of all devices together, or a share of what is free on each, of which the
            scarcest decides.
        block_nbytes: Bytes of one block by device.
    """
    if (num_blocks is None) == (memory is None):
        raise InvalidRequestError(
            f"num_blocks is {num_blocks!r} and memory is {memory!r}; give exactly one of them, e.g. memory='2GiB'."
        )
    if num_blocks is not None:
        if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or num_blocks < 1:
            raise InvalidRequestError(f"num_blocks is {num_blocks!r}; it has to be a positive integer.")
        return num_blocks
    memory = as_share(memory)
    if isinstance(memory, float):
        return min(_fitting(memory, nbytes, device) for device, nbytes in block_nbytes.items())
    return _fitting(memory, sum(block_nbytes.values()), next(iter(block_nbytes)))


def num_host_blocks_for(offload_memory: Any, block_nbytes: Mapping[Any, int], prefix_caching: bool) -> int:
    """How many blocks in host memory hold what the pool evicts: 0 for `offload_memory=None`; see `num_blocks_for`."""
    if offload_memory is None:
        return 0
    if not prefix_caching:
        raise InvalidRequestError(
            f"offload_memory is {offload_memory!r} and prefix_caching is False: blocks that cannot be found again cannot come "
            "back from host memory. Leave one of the two out."
        )
    return _fitting(offload_memory, sum(block_nbytes.values()), torch.device("cpu"), "offload_memory")


def require_room(block_nbytes: Mapping[Any, int], num_blocks: int, num_host_blocks: int) -> None:
    """Refuses a pool that can never fit; warns of one that does not fit now, where memory is promised until it is written.

    Args:
        block_nbytes: Bytes of one block by device.
        num_blocks, num_host_blocks: Of the pool, and of those in host memory.

    Raises:
        InvalidRequestError: A device has less memory, used or not.
    """
    needed = {device: nbytes * num_blocks for device, nbytes in block_nbytes.items()}
    host = torch.device("cpu")
    needed[host] = needed.get(host, 0) + num_host_blocks * sum(block_nbytes.values())
    for device, nbytes in needed.items():
        total = total_memory(device)
        if total is None or nbytes <= (free := free_memory(device)):
            continue
        asked = (
            f"{format_bytes(nbytes)} of {device} for blocks; it has {format_bytes(total)}, {format_bytes(free)} free"
        )
        if nbytes > total:
            raise InvalidRequestError(f"the pool would take {asked}: ask for less, or for a share, such as memory=0.5.")
        if device == host:  # elsewhere torch says so at once
            logger.warning("the pool may take %s: the system may end this process when blocks are written", asked)


def _fitting(memory: Any, block_nbytes: int, device: torch.device, name: str = "memory") -> int:
    """How many blocks of so many bytes fit."""
    memory = as_share(memory)
    nbytes = parse_memory(memory, device, name)
    if nbytes < block_nbytes:
        raise InvalidRequestError(
            f"{name}={memory!r} is {nbytes} bytes{f' of {device}' if isinstance(memory, float) else ''}; one block alone "
            f"takes {block_nbytes} bytes.{unit_hint(memory)}"
        )
    return nbytes // block_nbytes if block_nbytes else 1  # models of states only keep nothing in blocks


def parse_memory(memory: Any, device: torch.device, name: str = "memory") -> int:
    """Bytes: an int as it is, "2GiB" or "500 MB" by its unit, a float in (0, 1], or "0.5", as share of the free memory."""
    memory = as_share(memory)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", memory, re.IGNORECASE)
        unit = {**_UNITS, **_BINARY_UNITS}.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise InvalidRequestError(
                f"{name} is {memory!r}; write it like '2GiB', '500MB' or '1000000', or give a share in (0, 1], such as 0.9."
            )
        return int(float(match[1]) * unit)
    if isinstance(memory, float):
        if not 0 < memory <= 1:
            raise InvalidRequestError(f"{name} is {memory!r}; a float is a share of the free memory, in (0, 1].")
        return int(free_memory(device) * memory)
    if not isinstance(memory, int) or isinstance(memory, bool) or memory <= 0:
        raise InvalidRequestError(f"{name} is {memory!r}; give bytes, a string such as '2GiB', or a share in (0, 1].")
    return memory


def as_share(memory: Any) -> Any:
    """A string such as "0.5", without a unit and in (0, 1], as a float; anything else as it is."""
    is_plain = isinstance(memory, str) and re.fullmatch(r"\s*\d*\.?\d+\s*", memory)
    return float(memory) if is_plain and 0 < float(memory) <= 1 else memory


def unit_hint(memory: Any) -> str:
    """What a number without a unit, of too few bytes for anything, may have been meant to be; empty for others."""
    text = memory.strip() if isinstance(memory, str) else ""
    is_small = re.fullmatch(r"\d+(\.\d+)?", text) and 1 < float(text) < 1024
    return f" {text} without a unit are bytes; did you mean '{text}GiB'?" if is_small else ""
