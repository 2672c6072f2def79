"""What a model's weights take, without having them."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ..compat import text_config
from ..errors import UnsupportedModelError
from .quantization import Scheme, scheme_of

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)


@dataclass(frozen=True)
class Weights:
    """A model's weights.

    Attributes:
        num_parameters: Tied ones once; None where they were not counted.
        nbytes: Bytes that they take.
        note: In words, where the bytes come from.
    """

    num_parameters: int | None
    nbytes: int
    note: str


def require_generator(config: PreTrainedConfig) -> Any:
    """The auto class that makes a model for this config; raises `UnsupportedModelError` if none generates text."""
    for auto_class in _AUTO_CLASSES:
        if type(config) in auto_class._model_mapping:
            return auto_class
    raise UnsupportedModelError(
        f"transformers has no model that generates text for the model type {config.model_type!r}: there is no cache to plan for."
    )


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory, on the meta device.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    auto_class = require_generator(config)
    config = copy.deepcopy(config)
    for each in (config, text_config(config)):
        each._experts_implementation = "batched_mm"  # no step of it depends on the values, of which there are none
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config, dtype=dtype)
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"transformers cannot build {config.model_type!r} here: {reason}") from error
    vars(model.config)["pad_token_id"] = None  # models that find it in a prompt warn, for which they look at values
    model.eval()
    return model


def weights_of(model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> Weights:
    """Counts the parameters of a model on the meta device.

    Args:
        config: Says how the weights are quantised, if they are.
        dtype: Of those that are not.
    """
    scheme = scheme_of(config)
    sizes = _parameters(model)
    count = sum(num for num, _ in sizes.values())
    if scheme is None or scheme.bits is None:
        note = (
            f"in {_name(dtype)}"
            if scheme is None
            else f"in {_name(dtype)}, as if they were not quantised: {scheme.name}"
        )
        return Weights(count, count * dtype.itemsize, note)
    output = model.get_output_embeddings()
    head = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    packed = sum(num for key, (num, kind) in sizes.items() if key not in head and _is_packed(kind, scheme))
    nbytes = int(packed * scheme.bits / 8) + (count - packed) * dtype.itemsize
    return Weights(
        count,
        nbytes,
        f"{scheme.name}: {packed / 1e9:.2f}e9 of them in {scheme.bits:.4g} bits, others in {_name(dtype)}",
    )


def _parameters(model: torch.nn.Module) -> dict[int, tuple[int, tuple[str, str]]]:
    """By identity, so that tied ones count once: how many numbers, what kind ("linear", "experts", ""), and the name."""
    found: dict[int, tuple[int, tuple[str, str]]] = {}
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = ""
            if parameter.ndim == 3 and "expert" in place:
                kind = "experts"
            elif parameter.ndim == 2 and isinstance(module, (torch.nn.Linear, Conv1D)):
                kind = "linear"
            found.setdefault(id(parameter), (parameter.numel(), (kind, f"{place}.{name}")))
    return found


def _is_packed(kind: tuple[str, str], scheme: Scheme) -> bool:
    what, name = kind
    return what in scheme.kinds and not any(re.search(pattern, name) for pattern in scheme.skipped)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
