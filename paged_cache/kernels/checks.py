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
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Raise `InvalidRequestError` if a kernel given these arguments of `paged_attention` would read beyond a tensor."""
    batch, (rows, num_heads, q_len, head_dim) = seq_lens.shape[0], query.shape
    _check_caches(key_cache, value_cache, key_scales, value_scales)
    if key_cache.shape[3] != head_dim:
        raise InvalidRequestError(
            f"query {tuple(query.shape)} and key cache {tuple(key_cache.shape)} differ in head_dim"
        )
    if num_heads % key_cache.shape[2]:
        raise InvalidRequestError(f"{num_heads} query heads are not a multiple of {key_cache.shape[2]} KV heads")
    if (cu_seqlens_q is None) != (max_q_len is None) or (cu_seqlens_q is not None and position_bias is not None):
        raise InvalidRequestError("the packed form takes cu_seqlens_q and max_q_len, both, and no position_bias")
    if rows != (batch if cu_seqlens_q is None else 1):
        raise InvalidRequestError(f"query {tuple(query.shape)} does not fit {batch} sequence lengths")
    wanted = {
        "block_table": (block_table, (batch, block_table.shape[-1])),
        "seq_lens": (seq_lens, (batch,)),
        "cu_seqlens_q": (cu_seqlens_q, (batch + 1,)),
        "kv_starts": (kv_starts, (batch,)),
        "sinks": (sinks, (num_heads,)),
        "alibi_slopes": (alibi_slopes, (num_heads,)),
    }
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise InvalidRequestError(f"{name} is {tuple(x.shape)}; it has to be {shape}")
    if position_bias is not None and (
        position_bias.shape[0] not in (1, batch) or position_bias.shape[1:3] != (num_heads, q_len)
    ):
        raise InvalidRequestError(
            f"position_bias is {tuple(position_bias.shape)}; it has to be [1 or {batch}, {num_heads}, {q_len}, kv_len]"
        )
    tensors = [query, key_cache, value_cache, position_bias, key_scales, value_scales, *(x for x, _ in wanted.values())]
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        raise InvalidRequestError(f"the tensors must be on one device, not on {sorted(devices)}")


def _check_caches(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise InvalidRequestError(
            f"key cache {tuple(key_cache.shape)} and value cache {tuple(value_cache.shape)} must agree in all but the "
            "last dimension"
        )
    for name, cache, scales in (("key", key_cache, key_scales), ("value", value_cache, value_scales)):
        if (cache.dtype in LARGEST) != (scales is not None):
            raise InvalidRequestError(
                f"a {name} cache of {cache.dtype} {'needs' if scales is None else 'has no'} {name}_scales"
            )
        if scales is not None and (scales.shape != cache.shape[:3] or scales.dtype is not torch.float32):
            raise InvalidRequestError(
                f"{name}_scales is {scales.dtype} {tuple(scales.shape)}; it has to be float32 {tuple(cache.shape[:3])}"
            )
