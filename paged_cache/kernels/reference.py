"""Paged attention in plain torch: any device, any dtype. The ground truth for the fast kernels, and their fallback."""

from typing import Any

import torch
import torch.nn.functional as F

from .checks import check_shapes
from .quantized import as_bytes, dequantize, quantize


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
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
    memo: dict[Any, Any] | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of each sequence over all its tokens, read through a block table.

    Row `b` brings `q_len` new tokens: the same number in all rows, or `cu_seqlens_q[b + 1] - cu_seqlens_q[b]` of them in
    the packed form. Query `i` of the row stands at position `p = seq_lens[b] - q_len + i` and sees the keys `j <= p` that
    are not hidden by `window`, `chunk` or `kv_starts`. A query that sees no key (rows of length 0, `p < 0`) yields zeros.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`; packed: `[1, num_heads, num_tokens, head_dim]`, row after row.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, any strides, last dimension contiguous. Floating
            point, or int8 or float8_e4m3fn with `key_scales`.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, likewise.
        block_table: int32 `[batch, max_blocks]`. Entries that no query can see may be -1 and are never read.
        seq_lens: int32 `[batch]`, tokens of each row, the new ones included.
        scale: Factor on the scores.
        cu_seqlens_q: int32 `[batch + 1]`, where each row's tokens begin in the packed form, and the end of the last.
        max_q_len: Most new tokens of a row; given with `cu_seqlens_q`, so that nobody has to ask the device.
        window: Each query sees at most its last `window` keys, itself included (Mistral's sliding window).
        chunk: Each query sees only keys of its own chunk, `j // chunk == p // chunk` (Llama 4).
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: `[num_heads]`, one extra logit per head in the softmax denominator (GPT-OSS).
        alibi_slopes: `[num_heads]`; `slope * (j - p)` is added to the scores (Press et al., "Train Short, Test Long").
        position_bias: `[1 or batch, num_heads, q_len, kv_len]` with `kv_len >= max(seq_lens)`, any strides, added to the
            scores (T5); -inf hides a key. Not in the packed form.
        kv_starts: int32 `[batch]`, keys before it are hidden: left padding that takes slots.
        key_scales: float32 `[num_blocks, block_size, num_kv_heads]`, any strides: the factor on each quantised key.
        value_scales: Likewise for values.
        memo: Whatever a kernel wants to remember between calls that differ in `query`, caches, scales, `sinks` and
            `position_bias` only, as the layers of one forward do. Use a new one for each step and block table.

    Returns:
        `[batch, q_len, num_heads, v_head_dim]`, packed `[1, num_tokens, num_heads, v_head_dim]`, in the dtype of `query`,
        contiguous. Computed in float32, or in float64 if `query` is float64.

    Raises:
        InvalidRequestError: Shapes, dtypes or devices do not fit. Contents are trusted: ids in `block_table` that are no
            blocks, or `cu_seqlens_q` that do not rise from 0 to `num_tokens`, lead a fast kernel out of its memory. Only
            the CPU kernel looks at them, and only in calls without a `memo`.
    """
    options: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max_q_len, "window": window, "chunk": chunk}
    options |= {"softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes, "position_bias": position_bias}
    options |= {"kv_starts": kv_starts, "key_scales": key_scales, "value_scales": value_scales}
    check_shapes(query, key_cache, value_cache, block_table, seq_lens, **options)
    if cu_seqlens_q is not None:
        assert max_q_len is not None
        columns = _columns(cu_seqlens_q, max_q_len, query.shape[2])
        packed, query = query, query.new_zeros(len(seq_lens), query.shape[1], max_q_len, query.shape[3])
        query[columns[0], :, columns[1]] = packed[0].transpose(0, 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    (num_heads, q_len), (block_size, num_kv_heads) = query.shape[1:3], key_cache.shape[1:3]
    kv_len = block_table.shape[1] * block_size
    visible = visible_keys(seq_lens, q_len, kv_len, window, chunk, kv_starts)
    if cu_seqlens_q is not None:  # the columns before a row's own queries see nothing
        visible[_is_filler(cu_seqlens_q, q_len)] = False

    seen = visible.any(1)[..., None, None]  # [batch, kv_len, 1, 1]: the rest may be uninitialised memory
    table = block_table.long().clamp(min=0)
    group = num_heads // num_kv_heads
    keys = _gather(key_cache, key_scales, table, dtype).masked_fill(~seen, 0.0).repeat_interleave(group, 2)
    values = _gather(value_cache, value_scales, table, dtype).masked_fill(~seen, 0.0).repeat_interleave(group, 2)

    scores = torch.einsum("bhqd,bkhd->bhqk", query.to(dtype), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(dtype)[:, None, None] * _distances(seq_lens, q_len, kv_len)[:, None]
    hidden = ~visible[:, None]
    if position_bias is not None:
        bias = F.pad(position_bias.to(dtype)[..., :kv_len], (0, max(kv_len - position_bias.shape[3], 0)))
        scores, hidden = scores + bias, hidden | (bias == float("-inf"))
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    # A row of nothing but -inf becomes NaN, which is zeroed here; a NaN from the model stays visible.
    probs = torch.softmax(scores, dim=-1)[..., :kv_len].masked_fill(hidden, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, values).to(query.dtype).contiguous()
    return out if cu_seqlens_q is None else out[columns[0], columns[1]][None]


def visible_keys(
    seq_lens: torch.Tensor,
    q_len: int,
    kv_len: int,
    window: int | None,
    chunk: int | None,
    kv_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool `[batch, q_len, kv_len]`: which keys each query sees."""
    kv_pos = torch.arange(kv_len, device=seq_lens.device)
    q_pos = seq_lens[:, None].long() - q_len + torch.arange(q_len, device=seq_lens.device)  # [batch, q_len]
    visible = kv_pos <= q_pos[..., None]
    if window is not None:
        visible &= kv_pos > q_pos[..., None] - window
    if chunk is not None:
        visible &= kv_pos // chunk == (q_pos // chunk)[..., None]
    if kv_starts is not None:
        visible &= kv_pos >= kv_starts[:, None, None]
    return visible


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
    """Writes new K and V into their slots, quantised on the way where the cache holds 8 bits.

    Args:
        keys: `[num_tokens, num_kv_heads, head_dim]`, any strides.
        values: `[num_tokens, num_kv_heads, v_head_dim]`, likewise.
        key_cache, value_cache, key_scales, value_scales: See `paged_attention`; written.
        slot_mapping: int64 `[num_tokens]`, `block_id * block_size + offset`, all different; -1 leaves a token out.
    """
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    places = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for new, cache, scales in ((keys, key_cache, key_scales), (values, value_cache, value_scales)):
        if scales is None:
            cache[places] = new.detach()[kept].to(cache.dtype)
        else:
            codes, scales[places] = quantize(new.detach()[kept], cache.dtype)
            as_bytes(cache)[places] = as_bytes(codes)


def copy_blocks(sources: list[torch.Tensor], destinations: list[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copies whole blocks in all layers at once.

    Args:
        sources: Tensors `[num_blocks, ...]`: slabs of keys, values, scales.
        destinations: As many, of the same dtypes and shapes per block; may be the same tensors, or on another device.
        pairs: int64 `[num_pairs, 2]`, source and destination block. No block is both; destinations are all different.
    """
    for source, destination in zip(sources, destinations, strict=True):
        blocks = as_bytes(source).index_select(0, pairs[:, 0].to(source.device)).to(destination.device)
        as_bytes(destination).index_copy_(0, pairs[:, 1].to(destination.device), blocks)


def _gather(cache: torch.Tensor, scales: torch.Tensor | None, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[batch, kv_len, num_kv_heads, dim]` of what a table names."""
    if scales is None:
        return cache[table].flatten(1, 2).to(dtype)
    codes = as_bytes(cache)[table].view(cache.dtype)
    return dequantize(codes, scales[table], dtype).flatten(1, 2)


def _columns(cu_seqlens_q: torch.Tensor, max_q_len: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each packed token, and its column when all rows end at column `max_q_len`."""
    tokens = torch.arange(num_tokens, device=cu_seqlens_q.device)
    rows = torch.searchsorted(cu_seqlens_q[1:].long(), tokens, right=True)
    return rows, tokens - cu_seqlens_q[1:][rows] + max_q_len


def _is_filler(cu_seqlens_q: torch.Tensor, max_q_len: int) -> torch.Tensor:
    """bool `[batch, max_q_len]`: the columns that no token of the packed form stands in."""
    return torch.arange(max_q_len, device=cu_seqlens_q.device) < max_q_len - cu_seqlens_q.diff()[:, None]


def _distances(seq_lens: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """`j - p` for each query and key: `[batch, q_len, kv_len]`."""
    q_pos = seq_lens[:, None] - q_len + torch.arange(q_len, device=seq_lens.device)
    return torch.arange(kv_len, device=seq_lens.device) - q_pos[..., None]
