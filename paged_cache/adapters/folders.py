"""Adapters from folders that peft's `save_pretrained` wrote."""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..compat import base_model, peft_layer_classes
from ..errors import InvalidRequestError
from . import BASE
from .activation import STATE
from .tuners import names_in, split
from .wrapping import Wrapping

_loaders: "weakref.WeakValueDictionary[int, FolderLoader]" = weakref.WeakValueDictionary()
"""By the id of a model, which each of them keeps alive."""

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def require_folder(name: Any, path: str | Path) -> Path:
    """The folder of an adapter, if it can be one.

    Raises:
        InvalidRequestError: The name cannot be one, the folder holds no adapter, or one that works on inputs.
    """
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise InvalidRequestError(f"adapter name {name!r}: a string without dots is needed, other than {BASE!r}.")
    folder = Path(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"adapter {name!r}: {folder} has no {CONFIG} that can be read ({error}): give a folder that save_pretrained of "
            "peft wrote."
        ) from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InvalidRequestError(f"adapter {name!r}: {folder / CONFIG} names no peft_type.")
    if not any((folder / weights).is_file() for weights in WEIGHTS):
        raise InvalidRequestError(f"adapter {name!r}: {folder} has no weights, {' or '.join(WEIGHTS)}.")
    if config.get("num_virtual_tokens") or config.get("alora_invocation_tokens"):
        raise InvalidRequestError(
            f"adapter {name!r} ({config['peft_type']}) changes the inputs of the model, which a batcher makes itself: only "
            "adapters that lie in the model's layers are served, such as LoRA."
        )
    return folder


class FolderLoader:
    """Puts adapters from folders into a model and takes them out again; everything else of it stays as it is.

    Args:
        model: A `PeftModel`, or a transformers model without adapters, which is wrapped while there are any.
        device: Where weights are read to.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        model = getattr(model, "_orig_mod", model)
        self._model, self._device = base_model(model), device
        self._peft: Any = model if model is not self._model else None
        self._is_own = self._peft is None
        self._wrapping = Wrapping(self._model)

    @classmethod
    def of(cls, model: torch.nn.Module, device: torch.device) -> "FolderLoader":
        """The one of a model, whoever else loads adapters into it."""
        inner = base_model(model)
        known = _loaders.get(id(inner))
        if known is None or (known._peft is None and getattr(model, "_orig_mod", model) is not inner):
            known = _loaders[id(inner)] = cls(model, device)
        return known

    def require_weights(self) -> None:
        """Looks whether adapters can be loaded beside the model's weights.

        Raises:
            InvalidRequestError: They are offloaded, so that peft would leave those of adapters empty.
        """
        name = next((name for name, parameter in self._model.named_parameters() if parameter.is_meta), None)
        if name is not None:
            raise InvalidRequestError(
                f"adapters cannot be loaded from folders into a model whose weights are offloaded, such as {name}: load them "
                "with peft before accelerate offloads the model."
            )

    def load(self, name: str, folder: Path) -> None:
        """Loads an adapter, which is not made active.

        Raises:
            Exception: What peft says of a folder that does not fit; nothing was changed.
        """
        self._wrapping.begin()
        try:
            with _preserving(self._model, is_first=self._peft is None):
                if self._peft is None:
                    self._wrap(name, folder)
                else:
                    self._add(name, folder)
        finally:
            self._wrapping.clear()

    def unload(self, name: str) -> None:
        """Takes an adapter out, if it is there."""
        if self._peft is None or name not in self._peft.peft_config:
            return
        if self._is_own and list(self._peft.peft_config) == [name]:
            self._peft.unload()
            self._peft = None
        else:
            with _preserving(self._model, is_first=False):
                self._peft.delete_adapter(name)
                if self._is_own:  # beside none that is active peft adds no other one
                    self._peft.set_adapter(next(iter(self._peft.peft_config)))
            self._wrapping.clear()

    def _wrap(self, name: str, folder: Path) -> None:
        from peft import PeftConfig, get_peft_model

        config: Any = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        try:
            self._peft = get_peft_model(self._model, config, adapter_name=name)
            self._fill(name, folder)
        except BaseException:
            if self._peft is not None:
                self._peft.unload()
                self._peft = None
            raise

    def _add(self, name: str, folder: Path) -> None:
        try:
            self._fill(name, folder)
        except BaseException:
            if name in self._peft.peft_config:
                self._peft.delete_adapter(name)
            raise

    def _fill(self, name: str, folder: Path) -> None:
        with _keeping(self._model, name, folder):
            result = self._peft.load_adapter(str(folder), name, torch_device=str(self._device))
        missing = [key for key in result.missing_keys if name in key.split(".")]
        if missing:
            raise InvalidRequestError(
                f"adapter {name!r}: {folder} lacks weights that its {CONFIG} asks for, such as {missing[0]}."
            )
        unexpected = [key for key in result.unexpected_keys if not _is_of_base(self._model, folder, key)]
        if unexpected:
            raise InvalidRequestError(
                f"adapter {name!r}: {folder} has weights that this model has no place for, such as {unexpected[0]}: it was made "
                "for another model."
            )


def _is_of_base(model: torch.nn.Module, folder: Path, key: str) -> bool:
    """Whether it is a weight of the base model: peft saves those of embeddings that any adapter in memory is for."""
    own = {f"base_model.model.{name.replace('.base_layer', '')}": x for name, x in model.named_parameters()}
    parameter = own.get(key.replace(".base_layer", ""))
    if parameter is None or not (folder / WEIGHTS[0]).is_file():
        return False
    with safe_open(folder / WEIGHTS[0], framework="pt") as file:
        saved = file.get_tensor(key)
    return saved.shape == parameter.shape and torch.equal(saved.to(parameter), parameter)


@contextmanager
def _keeping(model: torch.nn.Module, name: str, folder: Path) -> Iterator[None]:
    """Weights of the base model stay as they are, whatever is loaded from a folder meanwhile.

    Raises:
        InvalidRequestError: The folder has other ones.
    """
    kept = _base_weights(model, folder)
    try:
        yield
    finally:
        changed = [key for key, (parameter, before) in kept.items() if not torch.equal(parameter, before)]
        for key in changed:
            kept[key][0].data.copy_(kept[key][1])
    if changed:
        raise InvalidRequestError(
            f"adapter {name!r}: {folder} has other weights for {changed[0]} of the base model, which all rows share: save it "
            "with save_embedding_layers=False, or merge them into the base model."
        )


def _base_weights(model: torch.nn.Module, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the base model's parameters that a folder has, too: peft saves embeddings whose size or adapter is new."""
    saved = {name.removeprefix("base_model.model.") for name in _saved_names(folder)}
    own = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    return {name: (own[name], own[name].detach().clone()) for name in saved & own.keys()}


def _saved_names(folder: Path) -> list[str]:
    if not (folder / WEIGHTS[0]).is_file():
        return list(torch.load(folder / WEIGHTS[1], map_location="meta", weights_only=True))
    with safe_open(folder / WEIGHTS[0], framework="pt") as file:
        return list(file.keys())


@contextmanager
def _preserving(model: torch.nn.Module, is_first: bool) -> Iterator[None]:
    """Which adapters are active and which parameters have gradients is afterwards what it was.

    Args:
        model: The transformers model.
        is_first: There are no adapters yet: those to come are switched off for rows that name none.
    """
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tuners = list(split(model)[1])
    states = [{name: vars(tuner)[name] for name in STATE if name in vars(tuner)} for tuner in tuners]
    common = (
        {"_active_adapter": tuners[0].active_adapters, "_disable_adapters": tuners[0].disable_adapters}
        if tuners
        else {}
    )
    before = dict(zip(tuners, states, strict=True))
    try:
        yield
    finally:
        for tuner in split(model)[1]:
            vars(tuner).update(before.get(tuner, common or {"_active_adapter": [], "_disable_adapters": is_first}))
            if tuner not in before and not isinstance(tuner, peft_layer_classes()[0]):  # knows only what it holds
                vars(tuner)["_active_adapter"] = [name for name in tuner.active_adapters if name in names_in(tuner)]
        for parameter, has_gradient in gradients:
            parameter.requires_grad_(has_gradient)
