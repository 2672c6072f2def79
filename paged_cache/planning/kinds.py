"""The cache layers of a model in words and numbers: the formula of its bytes per token."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..compat import layer_configs
from ..memory.layout import LayerSpec
from ..model_spec import ModelSpec
from ..wording import format_bytes


@dataclass(frozen=True)
class LayerKind:
    """Layers that keep K and V of one shape for one window.

    Attributes:
        count: Layers.
        window: Tokens that they see; None for all.
        key_heads, key_dim, value_heads, value_dim: One token's key and value.
        query_heads: None where the config does not say.
        is_latent: Whether K is MLA's latent and V its rotary part.
        expanded: Elements per token that MLA saves: those of each head's K and V; 0 for others.
        itemsize, scale_itemsize: Bytes of an element, and of the scale of each key and value (0 without).
    """

    count: int
    window: int | None
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    query_heads: int | None
    is_latent: bool
    expanded: int
    itemsize: int
    scale_itemsize: int

    @property
    def numel(self) -> int:
        """Elements of one token in one layer."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all these layers, scales included."""
        scales = (self.key_heads + self.value_heads) * self.scale_itemsize
        return self.count * (self.numel * self.itemsize + scales)

    @property
    def formula(self) -> str:
        """The bytes as a product, with its numbers."""
        text = f"{self._layers} × {self._elements} × {self.itemsize} bytes"
        if self.scale_itemsize:
            text += f" + {self.count} × {self.key_heads + self.value_heads} scales × {self.scale_itemsize} bytes"
        return f"{text} = {format_bytes(self.bytes_per_token)}"

    @property
    def comparison(self) -> str:
        """What the kind of attention saves; empty for plain multi-head attention."""
        if self.is_latent and self.expanded:
            return (
                f"MLA: the cache holds the latent (as keys) and the rotary part (as values) once for all heads, not K and V of "
                f"{self.query_heads} heads: {self.expanded / self.numel:.1f} times less"
            )
        if not self.is_latent and self.query_heads and self.query_heads > self.key_heads:
            ratio = self.query_heads / self.key_heads
            name = "MQA" if self.key_heads == 1 else "GQA"
            return (
                f"{name}: {self.query_heads} query heads share {self.key_heads} KV heads, {ratio:g} times less than MHA"
            )
        return ""

    @property
    def _layers(self) -> str:
        window = f" of window {self.window:,}" if self.window is not None else ""
        return f"{self.count} layer{'s' if self.count > 1 else ''}{window}"

    @property
    def _elements(self) -> str:
        if self.is_latent:
            return f"({self.key_dim} latent + {self.value_dim} rotary dims)"
        heads = f"{self.key_heads} KV head{'s' if self.key_heads > 1 else ''}"
        if (self.key_heads, self.key_dim) == (self.value_heads, self.value_dim):
            return f"2 (K, V) × {heads} × {self.key_dim} dims"
        return f"(K: {self.key_heads} heads × {self.key_dim} + V: {self.value_heads} heads × {self.value_dim} dims)"


def layer_kinds(spec: ModelSpec, itemsize: int, scale_itemsize: int) -> tuple[LayerKind, ...]:
    """The layers of a model that keep K and V, by kind.

    Args:
        itemsize, scale_itemsize: As `storage.itemsizes` gives them.
    """
    configs = layer_configs(spec.config, spec.num_layers)
    counts = Counter((layer, *_attention(layer, configs[index])) for index, layer in spec.layers.items())
    return tuple(
        LayerKind(
            count, layer.window, layer.key_heads, layer.key_dim, layer.value_heads, layer.value_dim,
            heads, is_latent, expanded, itemsize, scale_itemsize,
        )
        for (layer, heads, is_latent, expanded), count in counts.items()
    )  # fmt: skip


def _attention(layer: LayerSpec, config: Any) -> tuple[int | None, bool, int]:
    """Query heads, whether K is MLA's latent, and the elements of a token if it were expanded for each head."""
    names = ("decoder_attention_heads", "num_attention_heads")
    heads = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    is_latent = layer.key_heads == 1 and layer.key_dim == getattr(config, "kv_lora_rank", None)
    expanded = [getattr(config, name, None) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    return heads, is_latent, sum(expanded) * (heads or 0) if is_latent else 0
