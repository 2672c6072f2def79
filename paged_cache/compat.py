"""Every question about the version or the presence of another library."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicCache

MIN_TRANSFORMERS = "5.17"

if Version(transformers.__version__) < Version(MIN_TRANSFORMERS):
    raise ImportError(
        f"paged_cache needs transformers>={MIN_TRANSFORMERS}, found {transformers.__version__}: pip install -U transformers"
    )

logger = logging.getLogger("paged_cache")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_traced(function: _Function) -> _Function:
    """The function as one that `torch.compile` calls between its graphs instead of looking into it."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


class _NoLayer:
    """Stands for a class that this version of transformers does not have."""


DummyLayer: type = getattr(cache_utils, "DummyLayer", _NoLayer)  # transformers >= 5.20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # the last one is cuBLAS's
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder that generates text, in models of any make."""
    return config.get_text_config(decoder=True)


def decoder_config(model: Any) -> PreTrainedConfig:
    """The config that the layers of the generating decoder ask: in some encoder-decoders (T5) a copy of the model's."""
    config = getattr(model.get_decoder(), "config", None) if model.config.is_encoder_decoder else None
    return config if isinstance(config, PreTrainedConfig) else text_config(model.config)


def layer_configs(config: PreTrainedConfig, num_layers: int) -> list[PreTrainedConfig]:
    """One config per layer; they differ in heterogeneous models (transformers >= 5.20)."""
    per_layer = list(getattr(config, "per_layer_config", None) or [])
    # before 5.20, layers that reuse another's K and V come last and have no cache layer
    return per_layer[:num_layers] if len(per_layer) >= num_layers else [config] * num_layers


def dynamic_layers(config: PreTrainedConfig) -> list[Any]:
    """The cache layers that transformers itself would use for this decoder."""
    return list(DynamicCache(config=config).layers)


def uses_attention_interface(model: torch.nn.Module, decoder: PreTrainedConfig) -> bool:
    """Whether the decoder's layers call a registered attention function; some models write out their own."""
    modules = (module for module in model.modules() if getattr(module, "config", None) is decoder)
    return any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__]) for module in modules)


def peft_layer_classes() -> tuple[type, ...]:
    """What peft puts around a model's layers. Does not import peft: without it there is nothing."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    return () if tuners is None or other is None else (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)


def plain_lora_classes() -> tuple[list[type], list[type]]:
    """peft's LoRA layers that add `B(A(x)) * scaling`: those around linear layers, quantized ones too, and around embeddings."""
    layers, quantized = sys.modules.get("peft.tuners.lora.layer"), sys.modules.get("peft.tuners.lora.bnb")
    if layers is None:
        return [], []
    names = ("Linear8bitLt", "Linear4bit")
    bits = [getattr(quantized, name) for name in names if hasattr(quantized, name)]
    return [layers.Linear, *bits], [layers.Embedding]


def offloaded_weights(module: torch.nn.Module) -> Mapping[str, Any] | None:
    """Where accelerate keeps the parameters of a module between two forwards; None if the module has them itself."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several in a row
    maps = (getattr(one, "weights_map", None) for one in hooks if getattr(one, "offload", False))
    return next((weights for weights in maps if weights is not None), None)


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside what `torch.compile` returns and inside a `PeftModel`, or the model itself."""
    model, peft = getattr(model, "_orig_mod", model), sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def inputs_of_peft(model: torch.nn.Module) -> str | None:
    """The method of a `PeftModel` that itself changes what goes into the model inside it: `base_model` is without its effect."""
    model, peft = getattr(model, "_orig_mod", model), sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return None
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            return str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "alora_invocation_tokens", None):
            return "aLoRA"
    return None


HOOKED_FORWARD = "_old_forward"
"""Where accelerate keeps the forward of a module that it put a hook around."""


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate's hook on a module computes, wherever its weights are meanwhile; None if none says so."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.empty(0, device=device).device  # "cuda" and 0 become "cuda:0"
    return None


def packed_dtypes() -> tuple[torch.dtype, ...]:
    """In which dtypes torch's oneDNN computes linear layers with packed weights here; none if it is missing."""
    operators = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(operators, name) for name in names):
        return ()
    has_bfloat16 = hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if has_bfloat16 else (torch.float32,)


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of `[out_features, in_features]` in the layout that oneDNN prefers on this CPU, for any number of rows."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def linear_with_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What `torch.nn.functional.linear` gives, by oneDNN."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return found
