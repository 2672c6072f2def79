"""Paged attention in plain torch: any device, any dtype. The ground truth for the fast kernels, and their fallback."""

import torch


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last `q_len` tokens of each sequence over all its tokens, read through a block table.

    Query `i` of row `b` stands at position `p = seq_lens[b] - q_len + i` and sees the keys `j <= p` that are not hidden
    by `window` or `chunk`. A query that sees no key (rows of length 0, `p < 0`) yields zeros.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, any strides, last dimension contiguous.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, likewise.
        block_table: int32 `[batch, max_blocks]`. Entries that no query can see may be -1 and are never read.
        seq_lens: int32 `[batch]`, tokens of each row, the `q_len` new ones included.
        scale: Factor on the scores.
        window: Each query sees at most its last `window` keys, itself included (Mistral's sliding window).
        chunk: Each query sees only keys of its own chunk, `j // chunk == p // chunk` (Llama 4).
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sinks: `[num_heads]`, one extra logit per head in the softmax denominator (GPT-OSS).

    Returns:
        `[batch, q_len, num_heads, v_head_dim]` in the dtype of `query`, contiguous. Computed in float32, or in float64
        if `query` is float64.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_heads, q_len = query.shape[1], query.shape[2]
    block_size, num_kv_heads = key_cache.shape[1], key_cache.shape[2]
    kv_len = block_table.shape[1] * block_size
    visible = visible_keys(seq_lens, q_len, kv_len, window, chunk)

    seen = visible.any(1)[..., None, None]  # [batch, kv_len, 1, 1]: the rest may be uninitialised memory
    table = block_table.long().clamp(min=0)
    keys = key_cache[table].flatten(1, 2).to(dtype).masked_fill(~seen, 0.0)
    values = value_cache[table].flatten(1, 2).to(dtype).masked_fill(~seen, 0.0)
    group = num_heads // num_kv_heads
    keys, values = (x.repeat_interleave(group, dim=2) for x in (keys, values))

    scores = torch.einsum("bhqd,bkhd->bhqk", query.to(dtype), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    # A row of nothing but -inf becomes NaN, which is zeroed here; a NaN from the model stays visible.
    probs = torch.softmax(scores, dim=-1)[..., :kv_len].masked_fill(~visible[:, None], 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, values)
    return out.to(query.dtype).contiguous()


def visible_keys(
    seq_lens: torch.Tensor, q_len: int, kv_len: int, window: int | None, chunk: int | None
) -> torch.Tensor:
    """bool `[batch, q_len, kv_len]`: which keys each query sees."""
    kv_pos = torch.arange(kv_len, device=seq_lens.device)
    q_pos = seq_lens[:, None].long() - q_len + torch.arange(q_len, device=seq_lens.device)  # [batch, q_len]
    visible = kv_pos <= q_pos[..., None]
    if window is not None:
        visible &= kv_pos > q_pos[..., None] - window
    if chunk is not None:
        visible &= kv_pos // chunk == (q_pos // chunk)[..., None]
    return visible
