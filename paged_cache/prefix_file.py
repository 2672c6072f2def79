"""The file of saved prefixes: safetensors, with a description in JSON. Nothing in it is ever run.

Tensors: `nodes.roots` and `nodes.parents` int64 `[num_nodes]`, parents before their children, -1 behind a root; `nodes.tokens`
int64 `[num_nodes, block_size]`; `nodes.holds` uint8 `[num_nodes, num_windows]`, whether there are K and V for the layers of
that window; `layers.<i>.keys` and `.values` `[num_held, block_size, heads, dim]`, in pools of 8 bits `.key_scales` and
`.value_scales` without the last dimension, for the nodes that hold the layer's window, in their order.
"""

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import InvalidRequestError
from .fingerprint import tensor_digest
from .memory.branches import Branch
from .memory.layout import LayerSpec

FORMAT = 1
_METADATA = "paged_cache"
_BROKEN = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError)
_SALTS: dict[str, type] = {"none": type(None), "bool": bool, "int": int, "str": str, "bytes": bytes, "tuple": tuple}


@dataclass(frozen=True)
class Root:
    """What else a prefix depends on besides its tokens, as another process can name it.

    Attributes:
        adapters: What the adapters that count were called, for messages; () for the base model.
        adapters_digest: Names their content.
        salt: The cache salt, as `exact_salt` gives it.
        extra: Tokens of padding before the first one, in models that count them.
    """

    adapters: tuple[str, ...]
    adapters_digest: str
    salt: Hashable
    extra: int


@dataclass(frozen=True)
class Description:
    """What K and V in a file are, besides tensors.

    Attributes:
        model_class: Of the model.
        config: Fields of its config that change what it computes.
        weights: Names the content of its base weights.
        dtype, kv_dtype: Of the pool, without "torch.".
        block_size: Tokens per block.
        layers: K and V per layer.
        roots: What the prefixes begin with.
        transformers: Version of the library that computed them.
    """

    model_class: str
    config: dict[str, Any]
    weights: str
    dtype: str
    kv_dtype: str
    block_size: int
    layers: dict[int, LayerSpec]
    roots: list[Root]
    transformers: str = transformers.__version__

    @property
    def windows(self) -> list[int | None]:
        """The windows of the layers, each once, in the order of the layers."""
        return list(dict.fromkeys(spec.window for spec in self.layers.values()))


@dataclass(frozen=True)
class PrefixFile:
    """All that a file holds.

    Attributes:
        description: What it is about.
        branches: The prefixes.
        holds: Per branch whether there are K and V for the layers of each window, in the order of `description.windows`.
        layers: Per layer its tensors, by their names in `memory.block_content`.
    """

    description: Description
    branches: list[Branch]
    holds: list[list[bool]]
    layers: dict[int, dict[str, torch.Tensor]]

    def holding(self, column: int) -> list[int]:
        """The branches with K and V for the layers of the window of this number, in the order of the layers' tensors."""
        return [branch for branch, held in enumerate(self.holds) if held[column]]


def can_name(salt: Hashable) -> bool:
    """Whether a salt (as `exact_salt` gives it) can be written to a file: None, bool, int, str, bytes and tuples of them."""
    try:
        return _salt_from(_salt_as_json(salt)) == salt
    except _BROKEN:
        return False


def write(path: Path, file: PrefixFile) -> None:
    """Writes a file beside `path` and gives it that name when it is complete. The same content gives the same bytes.

    A link stays one: what it points to is replaced. The mode is that of the file before, else what the umask leaves.

    Raises:
        OSError: It cannot be written, with the path and the reason; what was there is as it was.
    """
    tensors = _tensors(file)
    header = {"format": FORMAT, "versions": _versions(), "description": _as_json(file.description)}
    text = json.dumps({**header, "digest": _digest(header, tensors)}, sort_keys=True)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(
            exist_ok=False
        )  # its mode is what the umask leaves, which nothing else tells without changing it
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        save_file(tensors, temporary, metadata={_METADATA: text})
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read(path: Path) -> PrefixFile:
    """Reads a file and checks it from its first to its last byte; tensors may lie in a mapping of it.

    Raises:
        InvalidRequestError: It is of another kind or version, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_METADATA)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()} if text is not None else {}  # noqa: SIM118
    except _BROKEN as error:
        raise InvalidRequestError(f"{path} is no safetensors file, or a damaged one: {error}") from None
    if text is None:
        raise InvalidRequestError(f"{path} is a safetensors file, but not one that pool.save_prefixes wrote.")
    try:
        return _parse(path, json.loads(text), tensors)
    except InvalidRequestError:
        raise
    except _BROKEN as error:
        raise InvalidRequestError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _parse(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PrefixFile:
    digest, found = header.pop("digest"), header["format"]
    if found != FORMAT:
        raise InvalidRequestError(f"{path} has format {found}, this version reads {FORMAT}: save the prefixes again.")
    if digest != _digest(header, tensors):
        raise InvalidRequestError(f"{path} is damaged: its checksum does not fit its content.")
    description = _from_json(header["description"])
    num_roots, num_windows, size = len(description.roots), len(description.windows), description.block_size
    roots, parents = (_integers(tensors, f"nodes.{name}", ()) for name in ("roots", "parents"))
    tokens = _integers(tensors, "nodes.tokens", (size,))
    holds = _integers(tensors, "nodes.holds", (num_windows,), torch.uint8)
    branches = [Branch(r, p, tuple(t)) for r, p, t in zip(roots, parents, tokens, strict=True)]
    _check_branches(branches, num_roots)
    layers = {layer: _layer(tensors, layer) for layer in description.layers}
    if tensors:
        raise ValueError(f"tensors {sorted(tensors)[:4]} belong to no layer")
    file = PrefixFile(description, branches, [list(map(bool, row)) for row in holds], layers)
    if len(file.holds) != len(branches):
        raise ValueError(f"{len(branches)} nodes and {len(file.holds)} rows of nodes.holds")
    return file


def _check_branches(branches: list[Branch], num_roots: int) -> None:
    for i, branch in enumerate(branches):
        root = branches[branch.parent].root if branch.parent >= 0 else branch.root
        if not (-1 <= branch.parent < i and branch.root == root and 0 <= root < num_roots):
            raise ValueError(f"node {i} has root {branch.root} of {num_roots} and parent {branch.parent}")
    if len(set(branches)) != len(branches):
        raise ValueError("a node is there twice")


def _integers(
    tensors: dict[str, torch.Tensor], name: str, rest: tuple[int, ...], dtype: Any = torch.int64
) -> list[Any]:
    tensor = tensors.pop(name)
    if tensor.dtype != dtype or tensor.dim() != 1 + len(rest) or tuple(tensor.shape[1:]) != rest:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} [num_nodes, *{rest}]")
    return tensor.tolist()


def _layer(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): tensors.pop(name) for name in sorted(tensors) if name.startswith(prefix)}


def _tensors(file: PrefixFile) -> dict[str, torch.Tensor]:
    description, branches = file.description, file.branches
    count = len(branches)
    tensors = {
        "nodes.roots": torch.tensor([branch.root for branch in branches], dtype=torch.int64),
        "nodes.parents": torch.tensor([branch.parent for branch in branches], dtype=torch.int64),
        "nodes.tokens": torch.tensor([b.tokens for b in branches], dtype=torch.int64).view(
            count, description.block_size
        ),
        "nodes.holds": torch.tensor(file.holds, dtype=torch.uint8).view(count, len(description.windows)),
    }
    for layer, content in file.layers.items():
        tensors |= {f"layers.{layer}.{kind}": tensor for kind, tensor in content.items()}
    return tensors


def _digest(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    sums = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([header, sums], sort_keys=True).encode()).hexdigest()


def _as_json(description: Description) -> dict[str, Any]:
    layers = [{"layer": layer, **asdict(spec)} for layer, spec in description.layers.items()]
    roots = [{**vars(root), "salt": _salt_as_json(root.salt)} for root in description.roots]
    return {**vars(description), "layers": layers, "roots": roots}


def _from_json(fields: dict[str, Any]) -> Description:
    layers = {
        _checked(spec["layer"], int): LayerSpec(**{name: x for name, x in spec.items() if name != "layer"})
        for spec in fields["layers"]
    }
    for spec in layers.values():
        sizes = (spec.key_heads, spec.key_dim, spec.value_heads, spec.value_dim)
        if any(_checked(size, int) < 0 for size in sizes) or (
            spec.window is not None and _checked(spec.window, int) < 1
        ):
            raise ValueError(f"a layer has {spec}")
    for name in Description.__annotations__:
        if name not in ("layers", "roots"):
            _checked(fields[name], {"config": dict, "block_size": int}.get(name, str))
    roots = [
        Root(
            tuple(_checked(name, str) for name in root["adapters"]),
            _checked(root["adapters_digest"], str),
            _salt_from(root["salt"]),
            _checked(root["extra"], int),
        )
        for root in fields["roots"]
    ]
    if len({(root.adapters_digest, root.salt, root.extra) for root in roots}) != len(roots):
        raise ValueError("a root is there twice")
    return Description(**{**fields, "layers": layers, "roots": roots})


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _salt_as_json(salt: Any) -> list[Any]:
    kind, value = salt
    (name,) = [name for name, known in _SALTS.items() if known is kind]
    if kind is tuple:
        return [name, [_salt_as_json(item) for item in value]]
    return [name, value.hex() if kind is bytes else value]


def _salt_from(found: Any) -> tuple[type, Any]:
    name, value = found
    if name == "tuple":
        return tuple, tuple(_salt_from(item) for item in value)
    return _SALTS[name], _checked(bytes.fromhex(value) if name == "bytes" else value, _SALTS[name])


def _versions() -> dict[str, str]:
    """For people: only those in the description are compared."""
    try:
        own = version("paged-cache")
    except PackageNotFoundError:
        own = "unknown"
    return {"paged_cache": own, "torch": str(torch.__version__), "transformers": transformers.__version__}


def _sync(path: Path) -> None:
    """Waits until the file is on the disk."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
