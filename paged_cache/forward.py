"""What happens around a forward of a patched model: padding is left out, prefixes are reused, failures are undone."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from .cache import PagedCache
from .errors import InvalidRequestError
from .prompt import Prompt
from .reuse import row_keys, start_from_prefix
from .state import WITH_CROSS_ATTENTION, PagedState
from .step import StepInputs

CACHE_NAMES = ("past_key_values", "cache_params")

_NOT_IN_KEYS_AND_VALUES = {
    *CACHE_NAMES, "attention_mask", "input_ids", "labels", "logits_to_keep", "output_attentions",
    "output_hidden_states", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""Inputs that prefix keys account for, or that K and V do not depend on. With any other tensor nothing is shared."""


def find_cache(inputs: dict[str, Any]) -> PagedCache | None:
    """The `PagedCache` that a forward is called with, also inside an `EncoderDecoderCache`."""
    for name in CACHE_NAMES:
        cache = inputs.get(name)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if isinstance(cache, PagedCache):
            return cache
    return None


def begin_forward(model: PreTrainedModel, cache: PagedCache, inputs: dict[str, Any], lazy: bool) -> dict[str, Any]:
    """Opens the cache's step for a forward with these inputs and returns them without the tokens that it holds already.

    Raises:
        InvalidRequestError: No new tokens, right padding, another model's pool, another number of rows, or an encoder-decoder's cache
            without one for its cross attention; nothing was changed.
        OutOfBlocksError: The pool is too small; nothing was changed.
    """
    state = cache._state
    state.require_alive()
    state.settle()
    if not state.pool.belongs_to(model):
        raise InvalidRequestError(
            f"the cache's pool was made for another model than this {type(model).__name__}: make one with "
            "BlockPool.for_model(this_model)."
        )
    is_decoder = model.config.is_encoder_decoder
    if is_decoder and not any(isinstance(inputs.get(name), EncoderDecoderCache) for name in CACHE_NAMES):
        raise InvalidRequestError(f"{type(model).__name__} is an encoder-decoder; {WITH_CROSS_ATTENTION}")
    ids, mask = (inputs.get(f"decoder_{name}" if is_decoder else name) for name in ("input_ids", "attention_mask"))
    embeds = inputs.get("decoder_inputs_embeds" if is_decoder else "inputs_embeds")
    shape = _shape(ids, embeds)
    if shape is not None and shape[1] == 0:
        raise InvalidRequestError(_why_empty(state.length))
    state.is_patched = True
    if shape is None or not state.can_announce or not state.pool.spec.ignores_padding:
        return inputs
    num_rows = len(state.rows) if state.rows is not None else 0
    try:
        if num_rows:
            state.expand(shape[0])
        ids = None if embeds is not None or ids is None or ids.dim() != 2 else ids
        prompt = Prompt.read(ids, mask, state.length, shape, state.pads or None)
        prompt.require_left_padding()
        return _begin(model, state, prompt, inputs, lazy and not (is_decoder and mask is not None))
    except BaseException:
        _restore(state, num_rows)
        raise


def _why_empty(length: int) -> str:
    if not length:
        return "the forward has no tokens: the prompt is empty."
    return (
        f"the forward has no new tokens, the cache holds {length}: the prompt is no longer than what the cache was used for "
        "before. Another prompt needs a cache of its own, PagedCache(pool), or cache.reset()."
    )


def _restore(state: PagedState, num_rows: int) -> None:
    """Rows as they were before a forward that did not begin."""
    if num_rows == 0:
        state.clear()
    elif state.rows is not None and len(state.rows) > num_rows:
        state.select(list(range(0, len(state.rows), len(state.rows) // num_rows)))


def _begin(
    model: PreTrainedModel, state: PagedState, prompt: Prompt, inputs: dict[str, Any], lazy: bool
) -> dict[str, Any]:
    keys = _root_keys(model, state, prompt, inputs)
    if state.rows is None:
        if keys is None:
            state.start_rows([None] * prompt.batch)
        else:
            prompt, inputs = _drop(
                prompt, inputs, start_from_prefix(state, prompt, keys, _most_to_skip(model, prompt, inputs))
            )
    elif keys is None or keys != state.root_keys:
        state.forget_tokens()
    state.begin(
        StepInputs(
            batch=prompt.batch,
            q_len=prompt.q_len,
            pads=prompt.pads,
            tokens=prompt.tokens if state.root_keys is not None else None,
            lazy=lazy,
            is_regular=prompt.is_regular,
            needs_weights=bool(inputs.get("output_attentions") or getattr(model.config, "output_attentions", False)),
        )
    )
    return inputs


def _shape(ids: torch.Tensor | None, embeds: torch.Tensor | None) -> tuple[int, int] | None:
    source = embeds if embeds is not None else ids
    return None if source is None else (source.shape[0], source.shape[1])


def _root_keys(
    model: PreTrainedModel, state: PagedState, prompt: Prompt, inputs: dict[str, Any]
) -> list[Hashable | None] | None:
    """What each row's K and V depend on besides its tokens; None if that cannot be told."""
    if prompt.tokens is None or not prompt.is_regular or not state.pool.spec.is_prefix_exact:
        return None
    if state.rows is not None and state.root_keys is None:
        return None
    if any(_is_data(x) for name, x in inputs.items() if name not in _NOT_IN_KEYS_AND_VALUES):
        return None
    positions = inputs.get("position_ids")
    if prompt.has_positions(positions):
        first_positions = [0] * prompt.batch
    elif positions is None:  # the model counts columns: a row's keys depend on its padding
        first_positions = prompt.pads
    else:
        return None
    if state.rows is not None:
        if state.pool.light_key() != state.light_key:
            return None
        if prompt.q_len == 1 and not state.fills_a_block():
            return state.root_keys
    return row_keys(state, first_positions)


def _is_data(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple, dict)) and len(value) > 0)


def _most_to_skip(model: PreTrainedModel, prompt: Prompt, inputs: dict[str, Any]) -> int:
    """Columns that may be left out of the forward: the caller sees only the last `logits_to_keep` of them."""
    keep = inputs.get("logits_to_keep")
    wants_all = any(
        inputs.get(name) or getattr(model.config, name, False) for name in ("output_attentions", "output_hidden_states")
    )
    if not isinstance(keep, int) or keep < 1 or wants_all or inputs.get("labels") is not None:
        return 0
    return max(prompt.q_len - keep, 0)


def _drop(prompt: Prompt, inputs: dict[str, Any], skipped: int) -> tuple[Prompt, dict[str, Any]]:
    if not skipped:
        return prompt, inputs
    inputs = dict(inputs)
    for name in ("input_ids", "position_ids"):
        if inputs.get(name) is not None:
            inputs[name] = inputs[name][..., skipped:]
    assert prompt.tokens is not None
    tokens = [ids[max(skipped - pad, 0) :] for ids, pad in zip(prompt.tokens, prompt.pads, strict=True)]
    return replace(prompt, start=skipped, q_len=prompt.q_len - skipped, tokens=tokens), inputs
