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

from .state import PagedState

_PLUMBING = ("_state", "layer_idx")


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
            self._state.check_layer(self.layer_idx, key_states, value_states)
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

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
    states = {name: value for name, value in vars(source).items() if name not in _PLUMBING}
    vars(target).update(copy.deepcopy(states))


@cache
def _paged_class(template: type) -> type:
    """Model-defined layers keep their own methods, in front of ours."""
    if template in _PAGED:
        return _PAGED[template]
    if issubclass(template, LinearAttentionCacheLayerMixin):
        return type(f"Paged{template.__name__}", (_PagedHybridMixin, template), {"__module__": __name__})
    parent = PagedSlidingWindowLayer if issubclass(template, DynamicSlidingWindowLayer) else PagedLayer
    return type(f"Paged{template.__name__}", (template, parent), {"__module__": __name__, "update": PagedLayer.update})
