"""What all kernels ask of their arguments."""

from typing import Any

import torch

from paged_cache.errors import InvalidRequestError

from .quantized import LARGEST


def check_shapes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_q_len: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Raise `InvalidRequestError` if shapes, dtypes, devices or sizes among arguments of `paged_attention` do not fit.

    What the tensors contain is not looked at: `check_contents`.
    """
    for name, x, dims in (("query", query, 4), ("block_table", block_table, 2), ("seq_lens", seq_lens, 1)):
        if x.dim() != dims:
            raise InvalidRequestError(f"{name} is {tuple(x.shape)}; it has to have {dims} dimensions")
    for name, size in (("window", window), ("chunk", chunk), ("softcap", softcap)):
        if size is not None and not size > 0:
            raise InvalidRequestError(f"{name} is {size}; it has to be above 0, or None")
    batch, (rows, num_heads, q_len, head_dim) = seq_lens.shape[0], query.shape
    check_caches(key_cache, value_cache, key_scales, value_scales)
    if key_cache.shape[3] != head_dim:
        raise InvalidRequestError(
            f"query {tuple(query.shape)} and key cache {tuple(key_cache.shape)} differ in head_dim"
        )
    if key_cache.shape[2] == 0 or num_heads % key_cache.shape[2]:
        raise InvalidRequestError(f"{num_heads} query heads are not a multiple of {key_cache.shape[2]} KV heads")
    if (cu_seqlens_q is None) != (max_q_len is None) or (cu_seqlens_q is not None and position_bias is not None):
        raise InvalidRequestError("the packed form takes cu_seqlens_q and max_q_len, both, and no position_bias")
    if rows != (batch if cu_seqlens_q is None else 1):
        raise InvalidRequestError(f"query {tuple(query.shape)} does not fit {batch} sequence lengths")
    _check_sizes(
        block_table=(block_table, (batch, block_table.shape[1])),
        seq_lens=(seq_lens, (batch,)),
        cu_seqlens_q=(cu_seqlens_q, (batch + 1,)),
        kv_starts=(kv_starts, (batch,)),
        sinks=(sinks, (num_heads,)),
        alibi_slopes=(alibi_slopes, (num_heads,)),
    )
    if position_bias is not None and (
        position_bias.dim() != 4
        or position_bias.shape[0] not in (1, batch)
        or position_bias.shape[1:3] != (num_heads, q_len)
    ):
        raise InvalidRequestError(
            f"position_bias is {tuple(position_bias.shape)}; it has to be [1 or {batch}, {num_heads}, {q_len}, kv_len]"
        )
    others = (cu_seqlens_q, kv_starts, sinks, alibi_slopes, position_bias, key_scales, value_scales)
    _check_devices(query, key_cache, value_cache, block_table, seq_lens, *others)


def check_contents(
    block_table: torch.Tensor,
    num_blocks: int,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int | None,
    num_tokens: int,
) -> None:
    """Raise `InvalidRequestError` if a kernel would be led out of its tensors by what a table or `cu_seqlens_q` says.

    Waits for the device: only for calls that nobody has prepared.
    """
    if block_table.numel() and not -1 <= int(block_table.min()) <= int(block_table.max()) < num_blocks:
        raise InvalidRequestError(
            f"the block table names blocks {int(block_table.min())} to {int(block_table.max())}; there are {num_blocks}"
        )
    if cu_seqlens_q is None or max_q_len is None:
        return
    counts = cu_seqlens_q.diff()
    if int(cu_seqlens_q[0]) != 0 or int(cu_seqlens_q[-1]) != num_tokens or (counts < 0).any():
        raise InvalidRequestError(f"cu_seqlens_q is {cu_seqlens_q.tolist()}; it has to rise from 0 to {num_tokens}")
    if (counts > max_q_len).any():
        raise InvalidRequestError(f"max_q_len is {max_q_len}; a row has {int(counts.max())} new tokens")


def check_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Raise `InvalidRequestError` if arguments of `write_kv` do not fit."""
    if slot_mapping.dtype is not torch.int64 or slot_mapping.dim() != 1:
        raise InvalidRequestError(
            f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}; it has to be int64 [num_tokens]"
        )
    for name, new, cache, scales in (
        ("key", keys, key_cache, key_scales),
        ("value", values, value_cache, value_scales),
    ):
        if new.shape != (slot_mapping.shape[0], *cache.shape[2:]):
            raise InvalidRequestError(
                f"{name}s {tuple(new.shape)} do not fit {slot_mapping.shape[0]} slots of a cache {tuple(cache.shape)}"
            )
        _check_cache(name, cache, scales)
    if key_cache.shape[:2] != value_cache.shape[:2]:
        raise InvalidRequestError(
            f"key cache {tuple(key_cache.shape)} and value cache {tuple(value_cache.shape)} differ"
        )
    _check_devices(keys, values, key_cache, value_cache, slot_mapping, key_scales, value_scales)


def check_caches(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Raise `InvalidRequestError` unless these are caches of one pool, with scales if they need them."""
    _check_cache("key", key_cache, key_scales)
    _check_cache("value", value_cache, value_scales)
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise InvalidRequestError(
            f"key cache {tuple(key_cache.shape)} and value cache {tuple(value_cache.shape)} must agree in all but the "
            "last dimension"
        )


def _check_cache(name: str, cache: torch.Tensor, scales: torch.Tensor | None) -> None:
    if cache.dim() != 4:
        raise InvalidRequestError(f"the {name} cache is {tuple(cache.shape)}; it has to have 4 dimensions")
    if (cache.dtype in LARGEST) != (scales is not None):
        raise InvalidRequestError(
            f"a {name} cache of {cache.dtype} {'needs' if scales is None else 'has no'} {name}_scales"
        )
    if scales is None:
        return
    if scales.shape != cache.shape[:3] or scales.dtype is not torch.float32:
        raise InvalidRequestError(
            f"{name}_scales is {scales.dtype} {tuple(scales.shape)}; it has to be float32 {tuple(cache.shape[:3])}"
        )
    if cache.shape[3] > 1 and cache.stride(3) != 1:
        raise InvalidRequestError(f"the last dimension of the {name} cache has stride {cache.stride(3)}, not 1")


def _check_sizes(**wanted: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise InvalidRequestError(f"{name} is {tuple(x.shape)}; it has to be {shape}")


def _check_devices(*tensors: torch.Tensor | None) -> None:
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise InvalidRequestError(f"the tensors must be on one device, not on {sorted(map(str, devices))}")
