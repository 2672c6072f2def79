"""What a model's cache layers hold, read off its config."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from .compat import DummyLayer, dynamic_layers, layer_configs, text_config
from .memory.layout import LayerSpec

_ORDINARY = {DynamicLayer, DynamicSlidingWindowLayer}
_WITH_STATES = {
    *_ORDINARY, LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
}  # fmt: skip

_SEE_MORE_THAN_EARLIER_TOKENS = {"blt", "cpmant", "git", "kosmos-2", "kosmos-2.5", "moshi", "musicgen", "prophetnet"}
"""Models in which a token's K and V depend on more than the tokens before it: padding, or where the forward began."""

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class ModelSpec:
    """The cache layers of one decoder.

    Attributes:
        config: The decoder's config.
        num_layers: Cache layers, those without K and V included.
        layers: K and V per layer, for the layers that have them.
    """

    config: PreTrainedConfig
    num_layers: int
    layers: dict[int, LayerSpec]

    @cached_property
    def _kinds(self) -> set[type]:
        return {type(layer) for layer in cache_layers(self.config)} - {DummyLayer}

    @property
    def has_plain_attention(self) -> bool:
        """Whether K and V go from the cache to transformers' attention interface, with nothing chosen in between."""
        return self._kinds <= _WITH_STATES

    @property
    def ignores_padding(self) -> bool:
        """Whether what a cache holds for padding has no effect, so that it need not be stored."""
        return self.has_plain_attention and self.config.model_type not in _SEE_MORE_THAN_EARLIER_TOKENS

    @cached_property
    def has_length_dependent_rope(self) -> bool:
        """Whether positions are encoded by the length of the longest row, so that rows and forwards affect each other."""
        rope = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        return bool(_rope_types(rope) & _LENGTH_DEPENDENT_ROPE)

    @cached_property
    def is_prefix_exact(self) -> bool:
        """Whether K and V of a token depend on the tokens before it and on nothing else in a cache."""
        return (
            self._kinds <= _ORDINARY
            and self.ignores_padding
            and not self.config.is_encoder_decoder
            and not self.has_length_dependent_rope
        )


def model_spec(config: PreTrainedConfig) -> ModelSpec:
    """Reads the layers from any config with a text decoder.

    The kind of each layer is what transformers' own cache makes of it. Shapes follow the common names; where a model
    computes others, the first forward tells, and the pool follows it.
    """
    decoder = text_config(config)
    templates = cache_layers(decoder)
    configs = layer_configs(decoder, len(templates))
    layers = {
        index: _layer_spec(_window(template), layer_config)
        for index, (template, layer_config) in enumerate(zip(templates, configs, strict=True))
        if isinstance(template, CacheLayerMixin)
    }
    return ModelSpec(decoder, len(templates), layers)


def cache_layers(decoder: PreTrainedConfig) -> list[Any]:
    """Fresh layers of transformers' own cache, at least one for each decoder layer.

    Bart and T5 count encoder layers as `num_hidden_layers`; a decoder with more layers needs more.
    """
    layers = dynamic_layers(decoder)
    num_decoder_layers = max(_first(decoder, ("decoder_layers", "num_decoder_layers"), 0), len(layers))
    if len(layers) < num_decoder_layers:
        template = type(layers[0])
        layers += [template() for _ in range(num_decoder_layers - len(layers))]
    return layers


def has_reference_window(layer_type: type) -> bool:
    """Whether layers of this type window what is generated but keep the prompt in sight."""
    return hasattr(layer_type, "set_prefill_length")


def _window(template: CacheLayerMixin) -> int | None:
    """Tokens that the layer's cache keeps; None for all."""
    return None if has_reference_window(type(template)) else getattr(template, "sliding_window", None)


def _rope_types(rope: Any) -> set[str]:
    """All rope types in a config's parameters, which may be one dict or one per layer type."""
    if not isinstance(rope, dict):
        return set()
    own = {str(rope[name]) for name in ("rope_type", "type") if name in rope}
    return own.union(*(_rope_types(value) for value in rope.values()))


def _layer_spec(window: int | None, config: PreTrainedConfig) -> LayerSpec:
    rank = _first(config, ("kv_lora_rank",), None)
    if rank is not None:  # MLA caches the latent as key, the rotary part as value, and expands them after `update`
        return LayerSpec(window, 1, rank, 1, _first(config, ("qk_rope_head_dim",), 0))
    num_heads = _first(config, ("decoder_attention_heads", "num_attention_heads"), 1)
    num_kv_heads = _num_kv_heads(config, num_heads)
    head_dim = _first(config, ("head_dim", "d_kv"), None)
    if head_dim is None:
        head_dim = _first(config, ("hidden_size",), num_heads) // num_heads
    return LayerSpec(window, num_kv_heads, head_dim, num_kv_heads, _first(config, ("v_head_dim",), head_dim))


def _num_kv_heads(config: PreTrainedConfig, num_heads: int) -> int:
    if getattr(config, "new_decoder_architecture", False):
        return num_heads  # Falcon copies K and V to all heads before `update`
    if getattr(config, "multi_query", False):
        return 1
    return int(_first(config, ("num_key_value_heads", "num_kv_heads"), num_heads))


def _first(config: PreTrainedConfig, names: tuple[str, ...], default: Any) -> Any:
    """The first of these attributes that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), default)
