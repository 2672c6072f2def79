"""What all kernels ask of their arguments."""

import torch

from paged_cache.errors import InvalidRequestError


def check_shapes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Raise `InvalidRequestError` if a kernel given these arguments of `paged_attention` would read beyond a tensor."""
    batch, num_heads, _, head_dim = query.shape
    if key_cache.shape[:3] != value_cache.shape[:3] or key_cache.shape[3] != head_dim:
        raise InvalidRequestError(
            f"query {tuple(query.shape)}, key cache {tuple(key_cache.shape)} and value cache "
            f"{tuple(value_cache.shape)} do not fit: head_dim must agree, and the caches in all but the last dimension"
        )
    if num_heads % key_cache.shape[2]:
        raise InvalidRequestError(f"{num_heads} query heads are not a multiple of {key_cache.shape[2]} KV heads")
    if block_table.shape[:-1] != (batch,) or seq_lens.shape != (batch,):
        raise InvalidRequestError(
            f"block table {tuple(block_table.shape)} and sequence lengths {tuple(seq_lens.shape)} need {batch} rows"
        )
    if sinks is not None and sinks.shape != (num_heads,):
        raise InvalidRequestError(f"sinks {tuple(sinks.shape)} must have one entry for each of {num_heads} heads")
    device = query.device
    tensors = (query, key_cache, value_cache, block_table, seq_lens, query if sinks is None else sinks)
    if any(x.device != device for x in tensors):
        raise InvalidRequestError(f"the tensors must be on one device, not on {[str(x.device) for x in tensors]}")
