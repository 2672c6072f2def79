"""`patch` and `unpatch`: attention of one model reads blocks in place."""

import inspect
import weakref
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .attention import paged_attention_forward
from .compat import base_model, logger, text_config, uses_attention_interface
from .errors import UnsupportedModelError
from .forward import begin_forward, find_cache
from .masks import paged_mask
from .model_spec import model_spec

NAME = "paged_cache"
"""The attention implementation, as `model.config._attn_implementation` shows it."""

_patches: "weakref.WeakKeyDictionary[torch.nn.Module, _Patch]" = weakref.WeakKeyDictionary()


class Patched(AbstractContextManager["Patched"]):
    """What `patch` returns: leaving its `with` block unpatches the model, unless it was patched before."""

    def __init__(self, model: torch.nn.Module, is_owner: bool) -> None:
        self.model, self._is_owner = model, is_owner

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_owner:
            unpatch(self.model)


def patch(model: torch.nn.Module) -> Patched:
    """Lets the model's attention read a `PagedCache`'s blocks in place, and prompts be reused across calls.

    Patching twice is the same as once. Also a context manager: `with patch(model): ...`.

    Raises:
        UnsupportedModelError: `model` is no transformers model.
    """
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is no transformers model: nothing in it can be patched.")
    if inner in _patches:
        return Patched(inner, is_owner=False)
    _patches[inner] = _Patch(inner)
    return Patched(inner, is_owner=True)


def unpatch(model: torch.nn.Module) -> None:
    """Takes `patch` back, without a trace. A model that is not patched stays as it is."""
    applied = _patches.pop(base_model(model), None)
    if applied is not None:
        applied.remove()


def is_patched(model: torch.nn.Module) -> bool:
    """Whether `patch` is in effect."""
    return base_model(model) in _patches


class _Patch:
    """Two hooks and, where the model's attention goes through transformers' interface, another implementation name."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = text_config(model.config)
        self._config: PreTrainedConfig | None = None
        if model_spec(model.config).has_plain_attention and uses_attention_interface(model, decoder):
            self._config = decoder
        if self._config is not None:
            _register(self._config)
        lazy = self._config is not None
        self._hooks = [
            model.register_forward_pre_hook(partial(_before, lazy), with_kwargs=True, prepend=True),
            model.register_forward_hook(_after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._config is not None:
            _unregister(self._config)


def _before(lazy: bool, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inputs = kwargs
    if args:
        inputs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    cache = find_cache(inputs)
    if cache is None or torch.compiler.is_compiling():
        return None
    return (), begin_forward(model, cache, inputs, lazy)


def _after(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    inputs = kwargs
    cache = find_cache(inputs)
    if cache is not None:
        state = cache._state
        state.abort() if output is None else state.finish()


_priors: dict[int, tuple[PreTrainedConfig, str, int]] = {}
"""By the id of a decoder's config: the config, what it said before, and how many patched models share it."""


def _register(config: PreTrainedConfig) -> None:
    _, prior, count = _priors.get(id(config), (config, config._attn_implementation, 0))
    _priors[id(config)] = (config, prior, count + 1)
    config._attn_implementation_internal = NAME
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _unregister(config: PreTrainedConfig) -> None:
    _, prior, count = _priors[id(config)]
    if count > 1:
        _priors[id(config)] = (config, prior, count - 1)
        return
    del _priors[id(config)]
    config._attn_implementation_internal = prior
    if not _priors:
        del AttentionInterface._global_mapping[NAME]
        del AttentionMaskInterface._global_mapping[NAME]


def _prior(config: Any) -> str:
    """What a config's model used before; attention layers without a config of their own ask for the only one."""
    if id(config) in _priors:
        return _priors[id(config)][1]
    names = {prior for _, prior, _ in _priors.values()}
    if len(names) != 1:
        logger.warning("cannot tell the attention of a layer among %s: eager is used", sorted(names))
    return names.pop() if len(names) == 1 else "eager"


def _attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return paged_attention_forward(_prior(getattr(module, "config", None)), module, *args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    return paged_mask(_prior(kwargs.get("config")), *args, **kwargs)
