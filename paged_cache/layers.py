"""transformers' cache layers with K and V in the pool. What else a layer keeps (states, indexer keys) stays as it is."""

import copy
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .compat import not_traced
from .model_spec import has_reference_window
from .state import PagedState

PLUMBING = ("_state", "layer_idx")
"""Attributes that tie a layer to its cache; all others are what it keeps."""


class PagedLayer(DynamicLayer):
    """K and V of one layer, `[batch, heads, tokens, dim]`, in blocks.

    Rows belong to the whole cache: `PagedCache` reorders, crops and resets them once for all layers, and the methods of
    that name do nothing here, so that subclasses only look after what they keep besides K and V.
    """

    _state: PagedState
    layer_idx: int

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys that the next token can see, gathered; None before the first token."""
        dense = self._dense()
        return dense[0] if dense else None

    @keys.setter
    def keys(self, value: Any) -> None:
        pass

    @property
    def values(self) -> torch.Tensor | None:
        """All values that the next token can see, gathered; None before the first token."""
        dense = self._dense()
        return dense[1] if dense else None

    @values.setter
    def values(self, value: Any) -> None:
        pass

    def _dense(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._state.read(self.layer_idx) if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Compares the layer's first K and V with the pool."""
        if key_states.shape[-2]:
            self._state.pool.check_layer(self.layer_idx, key_states, value_states)
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

    @not_traced
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new K and V into blocks and returns all that this forward can see."""
        if not self.is_initialized:
            PagedLayer.lazy_initialization(self, key_states, value_states)
        return self._state.update(self.layer_idx, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens that the layer has seen, padding included."""
        return self._state.layer_lengths[self.layer_idx]

    def offload(self) -> None:
        """Blocks stay where they are."""

    def prefetch(self) -> None:
        """Blocks stay where they are."""

    def reset(self) -> None:
        """See the class: the cache resets rows."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """See the class: the cache reorders rows."""

    def crop(self, tokens_to_remove: int) -> None:
        """See the class: the cache crops rows."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See the class: the cache repeats rows."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See the class: the cache selects rows."""


class PagedSlidingWindowLayer(PagedLayer, DynamicSlidingWindowLayer):
    """A layer that sees its last `sliding_window` tokens; blocks behind them go back to the pool."""

    @property
    def cumulative_length(self) -> int:
        """Tokens that the layer has seen, padding included."""
        return self._state.layer_lengths[self.layer_idx]

    @cumulative_length.setter
    def cumulative_length(self, value: Any) -> None:
        pass


class _ReferenceWindowMixin(PagedLayer):
    """A prompt that stays visible, and a window over what is generated after it (Unlimited-OCR): all of it is stored."""

    prefill_length: int | None
    sliding_window: int

    @property
    def prefill_cumulative_length(self) -> int:
        """Tokens of the prompt that the layer has seen."""
        length = PagedLayer.get_seq_length(self)
        return length if self.prefill_length is None else min(length, self.prefill_length)

    @prefill_cumulative_length.setter
    def prefill_cumulative_length(self, value: Any) -> None:
        pass

    @property
    def cumulative_length(self) -> int:
        """Tokens behind the prompt that the layer has seen."""
        return PagedLayer.get_seq_length(self) - self.prefill_cumulative_length

    @cumulative_length.setter
    def cumulative_length(self, value: Any) -> None:
        pass

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        num_hidden = max(self.cumulative_length - self.sliding_window + 1, 0)
        keys, values = PagedLayer.update(self, *args, **kwargs)
        if self.prefill_length is None:
            self.prefill_length = PagedLayer.get_seq_length(self)
        if num_hidden:
            prompt, behind = slice(self.prefill_length), slice(self.prefill_length + num_hidden, None)
            keys, values = (torch.cat([x[:, :, prompt], x[:, :, behind]], dim=2) for x in (keys, values))
        return keys, values

    def get_seq_length(self) -> int:
        return PagedLayer.get_seq_length(self)

    def reset(self) -> None:
        self.prefill_length = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        PagedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        PagedLayer.crop(self, tokens_to_remove)


class _PagedHybridMixin(LinearAttentionLayer, PagedLayer):
    """A layer with states and with K and V: transformers' classes name their two parents, so that this names ours."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        parent = PagedLayer if args else LinearAttentionLayer
        parent.lazy_initialization(self, *args, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return PagedLayer.update(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)


class PagedHybridLayer(_PagedHybridMixin, LinearAttentionAndFullAttentionLayer):
    """Linear attention states beside K and V of all tokens."""


class PagedHybridSlidingLayer(
    _PagedHybridMixin, PagedSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer
):
    """Linear attention states beside K and V of a sliding window."""


_PAGED: dict[type, type] = {
    DynamicLayer: PagedLayer,
    DynamicSlidingWindowLayer: PagedSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer: PagedHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: PagedHybridSlidingLayer,
}


def paged_layer(template: Any, layer_idx: int, state: PagedState) -> Any:
    """The paged form of one of transformers' cache layers; a layer without K and V as it is."""
    if not isinstance(template, CacheLayerMixin):
        return template
    paged = _paged_class(type(template))
    layer: Any = object.__new__(paged)
    layer._state, layer.layer_idx = state, layer_idx
    copy_states(template, layer)
    return layer


def copy_states(source: Any, target: Any) -> None:
    """Gives `target` a copy of all that `source` keeps outside the pool."""
    states = {name: value for name, value in vars(source).items() if name not in PLUMBING}
    vars(target).update(copy.deepcopy(states))


@cache
def _paged_class(template: type) -> type:
    """Model-defined layers keep their own methods, in front of ours."""
    if template in _PAGED:
        return _PAGED[template]
    bases, methods = _bases(template)
    # transformers enters every new class with a `_layer_type` in its registry, so that ours gets it afterwards
    paged = type(f"Paged{template.__name__}", bases, {"__module__": __name__, "_layer_type": None, **methods})
    paged._layer_type = getattr(template, "_layer_type", None)  # type: ignore[attr-defined]
    return paged


def _bases(template: type) -> tuple[tuple[type, ...], dict[str, Any]]:
    if issubclass(template, LinearAttentionCacheLayerMixin):
        return (_PagedHybridMixin, template), {}
    if has_reference_window(template):
        return (_ReferenceWindowMixin, template), {}
    parent = PagedSlidingWindowLayer if issubclass(template, DynamicSlidingWindowLayer) else PagedLayer
    return (template, parent), {"update": PagedLayer.update}
