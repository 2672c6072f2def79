"""Names a model by what it computes: the same in every process, on every device, with or without peft around it."""

import hashlib
import json
from typing import Any

import torch

from .adapters import tuners as peft_layers
from .bits import plain, row_sums
from .compat import offloaded_weights
from .errors import InvalidRequestError

_VOLATILE = {
    "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map", "use_cache", "return_dict", "id2label",
    "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "gradient_checkpointing",
    "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "task_specific_params", "initializer_range",
}  # fmt: skip
"""Fields of a model's config that change neither K nor V; names that begin with "_" are paths and choices of kernels."""

_VOLATILE_OF_ADAPTERS = {
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode",
    "init_lora_weights", "init_weights", "lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "arrow_config", "ensure_weight_tying",
}  # fmt: skip
"""Fields of an adapter's config that say where it comes from or how it is trained."""


def tensor_digest(tensor: torch.Tensor) -> str:
    """Names a tensor's dtype, shape and bits, 32 hexadecimal digits; equal on all devices.

    One pass at the speed of memory, with temporaries of a few MiB. Against accidents, not against forgers.

    Raises:
        InvalidRequestError: Its content cannot be read.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for part in plain(tensor):
        if part.is_meta:
            raise InvalidRequestError(
                f"a tensor of shape {tuple(part.shape)} is on the meta device: its content is unknown."
            )
        try:
            flat = part.detach().contiguous().reshape(-1).view(torch.uint8)
        except (RuntimeError, NotImplementedError) as error:
            raise InvalidRequestError(
                f"a {type(tensor).__name__} of {tensor.dtype} has no bits to read: {error}"
            ) from None
        digest.update(row_sums(flat).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def model_config(model: Any) -> dict[str, Any]:
    """The fields of a model's config that change what it computes, as JSON has them."""
    return _as_json(model.config.to_dict(), _VOLATILE)  # type: ignore[no-any-return]


@torch.no_grad()
def weights_digest(model: torch.nn.Module) -> str:
    """Names the content of all base weights (adapters left out), 32 hexadecimal digits.

    Reads every weight once; those that accelerate offloaded where they are.

    Raises:
        InvalidRequestError: A weight is on the meta device and nothing says where its values are.
    """
    names = _names(model)
    known: dict[int, str] = {}  # tied weights are read once
    entries = []
    for module in peft_layers.split(model)[0]:
        for name, tensor in _saved(module):
            full = f"{names[module]}.{name}".lstrip(".")
            digest = known.get(id(tensor)) or tensor_digest(_readable(module, name, full, tensor))
            if isinstance(tensor, torch.nn.Parameter):  # the model has it: no other object gets its id meanwhile
                known[id(tensor)] = digest
            entries.append((full, digest))
    return _digest(sorted(entries))


@torch.no_grad()
def adapters_digest(model: torch.nn.Module, adapter_name: str | None) -> tuple[list[str], str]:
    """The adapters that count for rows with this one, None for those that are active, and what names their content.

    Returns:
        Their names, [] for the base model, and 32 hexadecimal digits that do not depend on the names, "none" for the base
        model. Merged adapters are part of the base weights.
    """
    names = _names(model)
    used: dict[str, None] = {}
    entries: list[Any] = []
    for tuner in peft_layers.split(model)[1]:
        if tuner.merged_adapters and not tuner.disable_adapters:
            continue
        counting = peft_layers.effective(tuner, adapter_name)
        used |= dict.fromkeys(counting)
        if counting:
            entries.append((names[tuner], [_numbers(tuner, adapter) for adapter in counting]))
    if not used:
        return [], "none"
    configs = getattr(model, "peft_config", {})
    fields = [configs[name].to_dict() if name in configs else None for name in used]
    return list(used), _digest([sorted(entries), _as_json(fields, _VOLATILE_OF_ADAPTERS)])


def loaded_adapters(model: torch.nn.Module) -> list[str]:
    """The adapters that are in memory; none of them counts where one is merged into the base weights."""
    return sorted({name for tuner in peft_layers.split(model)[1] for name in peft_layers.names_in(tuner)})


def merged_adapters(model: torch.nn.Module) -> list[str]:
    """The adapters that are part of the base weights now."""
    return list(peft_layers.merged(list(peft_layers.split(model)[1])))


def _saved(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a layer saves with its model, by name; those of quantised layers are more than their parameters."""
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    return [(name, value) for name, value in saved.items() if isinstance(value, torch.Tensor)]


def _names(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    wrapping = {"base_layer", "original_module", "token_adapter"}
    return {
        module: ".".join(part for part in name.split(".") if part not in wrapping)
        for name, module in model.named_modules()
    }


def _readable(module: torch.nn.Module, name: str, full: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor
    offloaded = offloaded_weights(module)
    try:
        kept = offloaded[name] if offloaded is not None else tensor
    except KeyError:
        kept = tensor
    if kept.is_meta:
        raise InvalidRequestError(
            f"the weight {full} is on the meta device and accelerate does not keep its values: load the model's weights first."
        )
    return torch.as_tensor(kept)


def _numbers(tuner: Any, adapter: str) -> list[tuple[str, str]]:
    """What an adapter is in a layer."""
    return sorted((attribute, _named(value)) for attribute, value in peft_layers.content(tuner, adapter))


def _named(value: Any) -> str:
    return tensor_digest(value) if isinstance(value, torch.Tensor) else repr(value)


def _as_json(value: Any, volatile: set[str]) -> Any:
    """What JSON can say of a config, the same whatever order sets have."""
    if isinstance(value, dict):
        kept = {str(key): item for key, item in value.items() if str(key) not in volatile}
        return {key: _as_json(kept[key], volatile) for key in sorted(kept) if not key.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_as_json(item, volatile) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if value is None or isinstance(value, (bool, int, str)):
        return value if not isinstance(value, str) else str(getattr(value, "value", value))
    return (
        repr(value)
        if isinstance(value, float)
        else str(value)
        if isinstance(value, torch.dtype)
        else type(value).__name__
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
