"""A model's config from wherever it is, and what of it says in which dtype and for how many tokens the model is made."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig

from ..compat import text_config
from ..errors import InvalidRequestError, UnsupportedModelError
from ..loading import expanded, must_ask_hub

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "seq_length", "n_ctx")


def read_config(model: str | Path | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a hub id, of a folder, or of a file such as `config.json`; a config as it is.

    Raises:
        InvalidRequestError: There is none that transformers can read.
    """
    if isinstance(model, PreTrainedConfig):
        return model
    path = expanded(model)
    looks_local = (
        path.is_absolute() or str(model).startswith((".", "~")) or path.suffix == ".json" or len(path.parts) > 2
    )
    if looks_local and not path.exists():
        raise InvalidRequestError(f"there is no {model}: give a folder with a config.json, such a file, or a model id.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidRequestError(f"{model} has no config.json: give a folder that `save_pretrained` wrote.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path if path.exists() else str(model),
            trust_remote_code=False,
            local_files_only=not must_ask_hub(str(model)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(f"cannot read the config of {model}: {_reason(error, path.exists())}") from error
    return config


def _reason(error: Exception, is_local: bool) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if is_local:
        return f"transformers does not understand it ({first})"
    return (
        "it is no folder or file here, and no such id is within reach of the hub; give a folder with a config.json, such a "
        f"file, or an id that the hub has, or, without network, one that is in its cache ({first})"
    )


def dtype_of(config: PreTrainedConfig, dtype: str | torch.dtype | None) -> tuple[torch.dtype, str]:
    """In which dtype the model computes, and who says so.

    Args:
        config: The whole model's.
        dtype: One of `DTYPES` by name, any `torch.dtype`, or "auto" (None): the config's.
    """
    if isinstance(dtype, torch.dtype):
        return dtype, "as given"
    if dtype not in (None, "auto"):
        if dtype not in DTYPES:
            raise InvalidRequestError(f"dtype is {dtype!r}; it has to be one of {', '.join(DTYPES)}, or auto.")
        return DTYPES[dtype], "as given"
    for each in (config, text_config(config)):
        named: Any = getattr(each, "dtype", None)
        named = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
        if isinstance(named, torch.dtype):
            return named, "of the config"
    return torch.float32, "transformers' default; the config names none"


def max_positions(decoder: PreTrainedConfig) -> int | None:
    """Tokens that the model is made for; None if the config does not say."""
    values = (getattr(decoder, name, None) for name in _LIMITS)
    return next((value for value in values if isinstance(value, int) and value > 1), None)


def check_generates(config: PreTrainedConfig) -> None:
    """Raises `UnsupportedModelError` for a config of an encoder, which has no cache."""
    decoder = text_config(config)
    is_encoder = getattr(decoder, "is_decoder", None) is False and type(config) in AutoModelForMaskedLM._model_mapping
    if is_encoder and not config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{config.model_type!r} is an encoder here (is_decoder=False): it reads all tokens at once and keeps no K and V. "
            "Plan for a model that generates."
        )
