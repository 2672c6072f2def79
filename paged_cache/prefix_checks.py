"""Whether a file of prefixes can be written or read, and fits a model and its pool."""

import os
import stat
from collections.abc import Container, Hashable
from pathlib import Path
from typing import Any

import torch
import transformers

from .adapters import BASE
from .adapters.tuners import split
from .errors import InvalidRequestError
from .fingerprint import loaded_adapters, merged_adapters, model_config, weights_digest
from .kernels.quantized import LARGEST
from .memory.layout import LayerSpec
from .memory.storage import KVStorage
from .prefix_file import PrefixFile, Root

States = dict[str | None, tuple[Hashable, tuple[str, ...], str]]
"""Per adapter name (None: whatever is active) the key of the weights, the adapters that count and what names their content."""


def check_target(path: Path) -> None:
    """Raises `InvalidRequestError` unless a file can be written there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise InvalidRequestError(f"{path} is a folder: name a file in it, such as {path / 'prefixes.safetensors'}.")
    if mode is not None and not stat.S_ISREG(mode):
        raise InvalidRequestError(f"{path} is no regular file but a device, a FIFO or a socket: name a file.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise InvalidRequestError(f"there is no folder {folder} for {path.name}: make it first.")
    if not _may_write(folder) or (mode is not None and not _may_write(path)):
        what = path if _may_write(folder) else f"its folder {folder}"
        raise InvalidRequestError(f"{path} cannot be written: Permission denied for {what}.")


def check_source(path: Path) -> None:
    """Raises `InvalidRequestError` unless there is a file that can be read."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device, a FIFO or a socket"
            raise InvalidRequestError(f"{path} is {kind}: name a file that pool.save_prefixes wrote.")
        path.open("rb").close()
    except FileNotFoundError:
        raise InvalidRequestError(f"there is no file {path}.") from None
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from None


def check_pool(path: Path, file: PrefixFile, storage: KVStorage, confirmed: Container[int]) -> None:
    """Raises `InvalidRequestError` unless the pool can hold what the file holds.

    Layers that are not `confirmed` may have other shapes: no forward has told yet whether the config tells the truth.
    """
    found = file.description
    _require_same(path, "dtype", found.dtype, dtype_name(storage.dtype))
    _require_same(path, "kv_dtype", found.kv_dtype, dtype_name(storage.kv_dtype))
    _require_same(path, "block_size", found.block_size, storage.block_size)
    specs = dict(sorted(storage.layout.specs.items()))
    _require_same(path, "layers with K and V", list(found.layers), list(specs))
    for layer, spec in specs.items():
        other = found.layers[layer]
        if layer in confirmed or other.window != spec.window:
            _require_same(path, f"layer {layer}", other, spec)
        content = {kind: (tensor.dtype, tuple(tensor.shape)) for kind, tensor in file.layers[layer].items()}
        count = len(file.holding(found.windows.index(other.window)))
        _require_same(path, f"tensors of layer {layer}", content, _expected(storage, other, count))


def check_kind(path: Path, file: PrefixFile, model: Any) -> None:
    """Raises `InvalidRequestError` unless the file is of a model of this kind and of this version of transformers."""
    found = file.description
    _require_same(path, "transformers", found.transformers, transformers.__version__)
    _require_same(path, "a model of class", found.model_class, type(model).__name__)
    config = model_config(model)
    for name in sorted(config.keys() | found.config.keys()):
        _require_same(path, f"config.{name}", found.config.get(name), config.get(name))
    tokens = [token for branch in file.branches for token in branch.tokens]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
        raise InvalidRequestError(
            f"{path} has token ids from {min(tokens)} to {max(tokens)}, the model knows 0 to {vocabulary - 1}."
        )


def check_weights(path: Path, file: PrefixFile, model: Any) -> None:
    """Raises `InvalidRequestError` unless the model has the weights that computed what the file holds. Reads all of them."""
    _require_same(path, "weights whose fingerprint is", file.description.weights, weights_digest(model))


def keys_of_roots(
    path: Path, file: PrefixFile, model: Any, states: States, adapter_name: str | None
) -> list[Hashable | None]:
    """What each root of the file is in this process, as `BlockPool.root_key` has it; None for adapters not asked for.

    Adapters are known by their content, whatever they are called.

    Raises:
        InvalidRequestError: No adapter has the content, or the weights are not in the state for it.
    """
    by_content = {digest: key for key, _, digest in states.values()}
    roots = file.description.roots
    missing = [root for root in roots if root.adapters_digest not in by_content]
    if adapter_name is not None:  # other adapters may be missing, and so may its name if its content is there
        is_there = len(missing) < len(roots)
        missing = [root for root in missing if not is_there and (root.adapters or (BASE,)) == (adapter_name,)]
    if missing:
        raise InvalidRequestError(_why_not(path, missing[0], model, states))
    keys = [by_content.get(root.adapters_digest) for root in roots]
    return [None if key is None else (key, root.salt, root.extra) for key, root in zip(keys, roots, strict=True)]


def why_unknown(model: Any) -> str:
    """Why it cannot be told in what state a model's weights are."""
    if training := [name for name, module in model.named_modules() if module.training]:
        what = f"of the model, {training[0]} is" if training[0] else "the model is"
        return f"{what} in training mode, so that K and V may be random: call model.eval() first."
    tensors = [tensor for module in split(model)[0] for tensor in (*module.parameters(False), *module.buffers(False))]
    if any(tensor.is_inference() for tensor in tensors):
        return "weights were made in inference mode, so that changes do not show: load the model outside of torch.inference_mode()."
    return "a batch of mixed adapters runs now, on other threads: try again when it is done."


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _expected(storage: KVStorage, spec: LayerSpec, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """By kind the dtype and the shape of a layer's tensors."""
    keys, values = (count, storage.block_size, spec.key_heads), (count, storage.block_size, spec.value_heads)
    kv_dtype = storage.kv_dtype
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "keys": (kv_dtype, (*keys, spec.key_dim)),
        "values": (kv_dtype, (*values, spec.value_dim)),
    }
    if kv_dtype in LARGEST:
        expected |= {"key_scales": (torch.float32, keys), "value_scales": (torch.float32, values)}
    return expected


def _why_not(path: Path, root: Root, model: Any, states: States) -> str:
    names, loaded, merged = list(root.adapters), loaded_adapters(model), merged_adapters(model)
    if merged:
        what = f"the adapters {names}" if names else "the model without adapters"
        return f"{path} has prefixes of {what}; the model has {merged} merged into its weights: unmerge them first."
    others = "ask for others with adapter_name"
    if len(names) == 1 and names[0] in loaded:
        return f"{path} does not fit: adapter {names[0]!r} has other weights; compute and save again, or {others}."
    if len(names) == 1:
        why = f"no adapter in the model has the weights of {names[0]!r}"
        return f"{path} does not fit: {why} (loaded are {loaded}); load it, or {others}."
    if root.adapters in [adapters for _, adapters, _ in states.values()]:
        return f"{path} does not fit: the adapters {names}, which are active together, have other weights."
    if set(names) <= set(loaded):
        return f"{path} has prefixes of {names} together; others are active: call set_adapter({names}), or {others}."
    return f"{path} does not fit: no adapters in the model have the weights of {names} (loaded are {loaded}); load them, or {others}."


def _require_same(path: Path, what: str, found: Any, here: Any) -> None:
    if found != here:
        raise InvalidRequestError(f"{path} was saved with {what} {found!r}, here it is {here!r}.")
