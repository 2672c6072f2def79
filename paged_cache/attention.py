"""The `"paged_cache"` attention function: a kernel on the blocks where it can, the model's own attention elsewhere."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat import logger
from .kernels import paged_attention
from .masks import LazyMask
from .paged_tensor import PagedTensor
from .step import PagedView

AttentionResult = tuple[torch.Tensor, torch.Tensor | None]

UNDERSTOOD = {
    "dropout", "is_causal", "output_attentions", "position_bias", "s_aux", "scaling", "sliding_window", "softcap",
}  # fmt: skip
"""Arguments of the attention function that kernels compute, or that are looked at here."""
WITHOUT_EFFECT = {
    "attention_mask", "cache_position", "labels", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_embeddings", "position_ids", "return_dict", "token_type_ids",
    "use_cache",
}  # fmt: skip
"""Arguments that models pass on and that change nothing for causal attention over a cache.

All others lead to the model's own attention unless they are None, as do transformers' `indices` and `block_indices` (sparse
attention), `sinks` (one per query), `cu_seq_lens_*` and `max_length_*` (packed images).
"""


def paged_attention_forward(
    prior: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> AttentionResult:
    """transformers' attention interface.

    Args:
        prior: The attention implementation that the model used before `patch`.
        module: The attention layer.
        query: `[batch, num_heads, q_len, head_dim]`.
        key, value: `[batch, num_kv_heads, kv_length, head_dim]`, `PagedTensor`s where the cache holds earlier tokens.
        attention_mask: A `LazyMask`, or any mask that the prior implementation takes.
        *args, **kwargs: What else the model passes.

    Returns:
        `[batch, q_len, num_heads, v_head_dim]` and the attention probabilities if the prior implementation gives them.
    """
    reason = why_prior(prior, kwargs) or why_dense(query, key, value, attention_mask, args, kwargs)
    if reason is None:
        return _on_blocks(query, key.source.view, attention_mask, kwargs), None  # type: ignore[attr-defined]
    if isinstance(key, PagedTensor):
        logger.debug("%s: dense attention: %s", type(module).__name__, reason)
    key, value = (x.dense() if isinstance(x, PagedTensor) else x for x in (key, value))
    mask = attention_mask.exact() if isinstance(attention_mask, LazyMask) else attention_mask
    return prior_attention(prior, module)(module, query, key, value, mask, *args, **kwargs)


def why_prior(prior: str, kwargs: dict[str, Any]) -> str | None:
    """Why the prior attention has to decide: transformers' sdpa leaves out or refuses what kernels and eager compute."""
    if prior == "sdpa" and (kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None):
        return "sdpa does not know softcap and sinks"
    return None


def why_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    """Why a call cannot go to a kernel; None if it can."""
    if not (isinstance(key, PagedTensor) and isinstance(value, PagedTensor)):
        return "keys or values are not paged tensors"
    view: PagedView = key.source.view  # type: ignore[attr-defined]
    if value.source.view is not view:  # type: ignore[attr-defined]
        return "keys and values come from different layers"
    if not view.step.is_regular:
        return "the padding mask hides more than left padding"
    if view.step.needs_weights or kwargs.get("output_attentions"):
        return "attention probabilities are asked for"
    if args or kwargs.get("dropout"):
        return "dropout or positional arguments"
    unknown = [name for name, x in kwargs.items() if x is not None and name not in _KNOWN]
    if unknown:
        return f"arguments {unknown} are not understood"
    if not isinstance(mask, LazyMask):
        return "the mask is not plainly causal"
    return _why_pattern_differs(view, mask, kwargs) or _why_per_head_differs(view, query, kwargs)


_KNOWN = UNDERSTOOD | WITHOUT_EFFECT


def _why_pattern_differs(view: PagedView, mask: LazyMask, kwargs: dict[str, Any]) -> str | None:
    """The mask decides what is hidden; the cache's window and the model's own argument must not disagree with it."""
    pattern, group = mask.source.pattern, view.group  # type: ignore[attr-defined]
    if mask.shape[-1] != group.kv_length:
        return "the mask was made for another layer's length"
    if kwargs.get("is_causal") is False and view.step.q_len > 1:
        return "attention is causal by its mask only"
    if kwargs.get("sliding_window") is not None and pattern.window is None and pattern.chunk is None:
        return "sliding_window without a sliding mask"
    if group.window is not None and view.step.q_len > 1 and pattern.window != group.window and pattern.chunk is None:
        return "the cache forgets what the mask shows"
    return None


def _why_per_head_differs(view: PagedView, query: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
    """Kernels take one sink per head, and a bias whose columns are stored tokens, all of them and from the first on."""
    (batch, num_heads, q_len, _), sinks, bias = query.shape, kwargs.get("s_aux"), kwargs.get("position_bias")
    if sinks is not None and sinks.shape != (num_heads,):
        return "there is more than one sink per head"
    if bias is None:
        return None
    if view.group.kv_offset or any(view.step.pads):
        return "columns of position_bias are not tokens"
    shape = num_heads, q_len, view.group.kv_length
    if bias.dim() != 4 or bias.shape[0] not in (1, batch) or bias.shape[1:] != shape:
        return f"position_bias is {tuple(bias.shape)}"
    return None


def _on_blocks(query: torch.Tensor, view: PagedView, mask: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    pattern, group = mask.source.pattern, view.group
    step, lengths = view.step, group.lengths
    blocks = step.storage.layers[view.layer]
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = pattern.window
    if group.window is not None and pattern.chunk is None:
        window = group.window if window is None else min(window, group.window)
    return paged_attention(
        query,
        blocks.keys,
        blocks.values,
        group.block_table,
        lengths.seq_lens,
        scale=scale,
        cu_seqlens_q=lengths.cu_seqlens_q,
        max_q_len=step.max_q_len,
        window=window,
        chunk=pattern.chunk,
        softcap=softcap,
        sinks=kwargs.get("s_aux"),
        position_bias=kwargs.get("position_bias"),
        key_scales=blocks.key_scales,
        value_scales=blocks.value_scales,
        memo=group.memos[scale, window, pattern.chunk, softcap],
    )


def prior_attention(prior: str, module: torch.nn.Module) -> Callable[..., AttentionResult]:
    """What the model would have called: a registered function, or the eager one of its own file."""
    names = vars(sys.modules[type(module).__module__])
    eager = names.get("eager_attention_forward")
    interface = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    return interface.get_interface(prior, eager)  # type: ignore[no-any-return]
