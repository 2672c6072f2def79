"""`paged_cache` among transformers' attention implementations, while a model is patched."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .attention import paged_attention_forward
from .compat import logger, not_traced
from .masks import paged_mask

NAME = "paged_cache"
"""The attention implementation, as `model.config._attn_implementation` shows it."""

_priors: dict[int, tuple[PreTrainedConfig, str, int]] = {}
"""By the id of a decoder's config: the config, what it said before, and how many patched models share it."""


def register(config: PreTrainedConfig, prior: str) -> PreTrainedConfig:
    """A decoder with this config, which used `prior` before, reads blocks in place from now on; for `unregister`."""
    _, prior, count = _priors.get(id(config), (config, prior, 0))
    _priors[id(config)] = (config, prior, count + 1)
    config._attn_implementation_internal = NAME
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    return config


def unregister(config: PreTrainedConfig) -> None:
    """A patched model with this config is patched no more; the last one gets its implementation back."""
    _, prior, count = _priors[id(config)]
    if count > 1:
        _priors[id(config)] = (config, prior, count - 1)
        return
    del _priors[id(config)]
    if config._attn_implementation == NAME:  # not if somebody chose another one meanwhile
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


@not_traced
def _attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return paged_attention_forward(_prior(getattr(module, "config", None)), module, *args, **kwargs)


@not_traced
def _mask(*args: Any, **kwargs: Any) -> Any:
    return paged_mask(_prior(kwargs.get("config")), *args, **kwargs)
