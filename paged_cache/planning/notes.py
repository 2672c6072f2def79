"""What about a model's memory is not in the formula, in sentences."""

from collections.abc import Iterator

from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ..memory.layout import PoolLayout
from ..model_spec import ModelSpec, cache_layers
from ..wording import format_bytes
from .requests import Lengths
from .states import Probe, States


def notes_on(
    config: PreTrainedConfig,
    spec: ModelSpec,
    layout: PoolLayout,
    probed: Probe | None,
    states: States | None,
    limit: int | None,
    context: int,
    lengths: Lengths,
) -> tuple[str, ...]:
    """Sentences about layers without K and V, groups, states, sharing and the context; those that apply."""
    return (
        *_on_layers(config, spec, states),
        *_on_shapes(probed, spec),
        *_on_groups(layout),
        *_on_lengths(lengths),
        *_on_sharing(spec, lengths),
        *_on_context(limit, context),
    )


def _on_layers(config: PreTrainedConfig, spec: ModelSpec, states: States | None) -> Iterator[str]:
    with_states = sum(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache_layers(spec.config))
    if states is None:
        yield "What a sequence keeps besides K and V cannot be told from this config; it is not counted."
    elif with_states or states.nbytes:
        yield (
            f"{with_states} layers keep states of a fixed size instead of K and V, or beside them: "
            f"{format_bytes(states.nbytes)} per sequence, outside of the blocks, whatever its length."
        )
    if states is not None and states.bytes_per_token:
        yield (
            f"Indexers keep keys of their own: {format_bytes(states.bytes_per_token)} per token, outside of the blocks, for every "
            "sequence."
        )
    num_shared = getattr(spec.config, "num_kv_shared_layers", 0) or 0
    if num_shared:
        yield f"{num_shared} layers use K and V of earlier layers and keep none."
    if config.is_encoder_decoder:
        yield "Cross-attention keeps K and V of the encoder's output besides; they are in no block and not counted."


def _on_shapes(probed: Probe | None, spec: ModelSpec) -> Iterator[str]:
    if probed is not None and probed.layers:
        index, real = next(iter(probed.layers.items()))
        numel = sum(layer.key_numel + layer.value_numel for layer in (spec.layers | probed.layers).values())
        yield (
            f"The model's code gives {len(probed.layers)} layers other shapes than the config tells, layer {index} for example K of "
            f"{real.key_heads} × {real.key_dim} and V of {real.value_heads} × {real.value_dim}: a pool follows at its first forward, "
            f"with as many blocks; then a token takes {numel:,} numbers. Give num_blocks rather than memory."
        )


def _on_groups(layout: PoolLayout) -> Iterator[str]:
    """Groups, and the parts of blocks that no layer uses."""
    num_groups = len(layout.windows)
    if num_groups > 1:
        yield (
            f"The layers form {num_groups} groups with blocks of their own, so that {num_groups} blocks hold the tokens of one; a "
            "group with a window gives back the blocks behind it."
        )
    unused = 1 - layout.numel_per_token / (num_groups * layout.entry_numel_per_token)
    if unused >= 0.005:
        yield f"Layers of different shapes share blocks: {unused:.0%} of each block's bytes stay unused on average."


def _on_lengths(lengths: Lengths) -> Iterator[str]:
    if lengths.are_equal:
        yield (
            "All requests are equally long: a padded batch wastes nothing there. Leave --prompt-len and --output-len out, or give a "
            "--trace, for lengths that differ as in life."
        )


def _on_sharing(spec: ModelSpec, lengths: Lengths) -> Iterator[str]:
    if not spec.is_prefix_exact and (lengths.shared_prefix_len or lengths.num_beams > 1):
        yield "Rows of this model share no prompts: its cache holds more than K and V, or K and V depend on more than the prefix."


def _on_context(limit: int | None, context: int) -> Iterator[str]:
    if limit is None:
        yield f"The config names no longest context; contiguous memory is planned for {context:,} tokens."
    elif context > limit:
        yield f"The model is made for {limit:,} tokens; the context of {context:,} is beyond that."
