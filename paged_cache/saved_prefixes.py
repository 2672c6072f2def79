"""Prefixes of a pool, to a file and back, so that they outlive a process."""

import weakref
from collections.abc import Callable
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .adapters import BASE
from .compat import logger
from .errors import InvalidRequestError
from .fingerprint import adapters_digest, loaded_adapters, merged_adapters, model_config, weights_digest
from .memory.block_content import read_anywhere, write_blocks
from .memory.branches import Branch, Placing, collect, plant
from .memory.host_storage import HostStorage
from .memory.layout import LayerSpec
from .memory.manager import BlockManager
from .memory.prefix import PrefixNode
from .memory.storage import KVStorage
from .prefix_checks import (
    States,
    check_kind,
    check_pool,
    check_source,
    check_target,
    check_weights,
    dtype_name,
    keys_of_roots,
    why_unknown,
)
from .prefix_file import Description, PrefixFile, Root, can_name, read, write
from .weights import WeightsVersion


class SavesPrefixes:
    """What a `BlockPool` can do with files of prefixes."""

    storage: KVStorage
    manager: BlockManager
    host_storage: HostStorage | None
    _model: weakref.ref[torch.nn.Module] | None
    _weights: WeightsVersion | None
    _confirmed: set[int]

    def save_prefixes(self, path: str | PathLike[str], adapter_name: str | None = None) -> int:
        """Writes the prefixes that the pool holds for the model as it is now to a safetensors file: docs/prefix_files.md.

        Args:
            path: The file; one of that name is replaced when the new one is complete, and keeps its mode.
            adapter_name: Only the prefixes of this adapter, "__base__" for the model without any; None for all.

        Returns:
            Tokens saved.

        Raises:
            InvalidRequestError: The path or the adapter is wrong, or it cannot be told what the prefixes depend on.
            OSError: The file cannot be written; what had its name is as it was.
        """
        path = Path(path)
        check_target(path)
        states = self._states(adapter_name)
        config, weights = model_config(self._inner), weights_digest(self._inner)
        with self.manager.lock:
            states = self._still(adapter_name, states)
            roots = _named_roots(self.manager, states)
            branches, nodes = collect(list(roots.values()))
            description = _describe(self.storage, self._inner, config, weights, list(roots))
            file = _copy(self.storage, self.host_storage, description, branches, nodes)
        write(path, file)
        return sum(map(any, file.holds)) * description.block_size

    def load_prefixes(self, path: str | PathLike[str], adapter_name: str | None = None) -> int:
        """Takes the prefixes of a file that `save_prefixes` wrote for the same model, as cached blocks.

        Where not all fit into the blocks that nobody references, the shortest prefixes are taken. A file is not trusted:
        all of it is checked before anything is changed.

        Args:
            path: The file.
            adapter_name: Only the prefixes that the file has for what this adapter is, whatever it was called.

        Returns:
            Tokens loaded; those that the pool holds already do not count.

        Raises:
            InvalidRequestError: There is no such file that can be read, it is damaged, or of another model, adapter, dtype, block size or
                version. Nothing was changed.
        """
        path = Path(path)
        check_source(path)
        states = self._states(adapter_name)
        file = read(path)
        check_kind(path, file, self._inner)
        check_pool(path, file, self.storage, self._confirmed)
        keys_of_roots(path, file, self._inner, states, adapter_name)
        check_weights(path, file, self._inner)
        with self.manager.lock:
            states = self._still(adapter_name, states)
            keys = keys_of_roots(path, file, self._inner, states, adapter_name)
            for layer, spec in file.description.layers.items():
                if len(file.layers[layer]["keys"]):
                    self.confirm(layer, spec)
            write_all = _writer(self.storage, file)
            num_loaded, num_left = plant(self.manager, keys, file.branches, _by_group(self.storage, file), write_all)
        size = file.description.block_size
        if num_left:
            logger.warning(
                "%s: %d tokens loaded, there were too few free blocks for %d more.",
                path,
                num_loaded * size,
                num_left * size,
            )
        return num_loaded * size

    def confirm(self, layer: int, spec: LayerSpec) -> None:
        """Takes the shapes of a layer."""
        raise NotImplementedError

    @property
    def _inner(self) -> Any:
        model = self._model() if self._model is not None else None
        if model is None or self._weights is None:
            raise InvalidRequestError("the pool's model is gone, or it was made without one: use BlockPool.for_model.")
        return model

    def _states(self, adapter_name: str | None) -> States:
        """All states of the weights that prefixes may belong to: the active adapters, none, each one that is loaded.

        Raises:
            InvalidRequestError: The state cannot be told, or there is no such adapter.
        """
        model, weights = self._inner, self._weights
        if not self.manager.prefix_caching:
            raise InvalidRequestError("the pool keeps no prefixes: make it with prefix_caching=True.")
        read_weights = weights.read() if weights is not None else None
        if read_weights is None:
            raise InvalidRequestError(why_unknown(model))
        merged, loaded = merged_adapters(model), loaded_adapters(model)
        names: list[str | None] = [None] if merged else [None, BASE, *loaded]
        if adapter_name is not None:
            if adapter_name not in names:
                why = f"{merged} are merged into the base weights" if merged else f"loaded are {loaded} and {BASE!r}"
                raise InvalidRequestError(f"adapter_name is {adapter_name!r}; {why}.")
            names = [adapter_name]
        states: States = {}
        for name in names:
            adapters, digest = adapters_digest(model, name)
            states[name] = read_weights.key(name), tuple(adapters), digest
        return states

    def _still(self, adapter_name: str | None, states: States) -> States:
        """The states that are as they were. Which adapters are active changes while a batcher mixes adapters."""
        now = self._states(adapter_name)
        same = {name: state for name, state in states.items() if now.get(name) == state}
        if not same or states.keys() - same.keys() - {None}:
            raise InvalidRequestError("the model's weights or adapters were changed meanwhile: try again.")
        return same


def _named_roots(manager: BlockManager, states: States) -> dict[Root, PrefixNode]:
    """The roots of these states, in an order that is the same in all processes."""
    by_key = {key: digest for key, _, digest in sorted(states.values(), key=itemgetter(2))}
    names = {digest: min(names for _, names, other in states.values() if other == digest) for digest in by_key.values()}
    found: dict[tuple[str, Any, int], PrefixNode] = {}
    skipped = []
    for node in manager.index.roots():
        if not isinstance(node.key, tuple) or len(node.key) != 3 or node.key[0] not in by_key:
            continue
        key, salt, extra = node.key
        if node.children and can_name(salt) and type(extra) is int:
            found.setdefault((by_key[key], salt, extra), node)
        elif node.children:
            skipped.append(salt[1] if isinstance(salt, tuple) else salt)
    if skipped:
        logger.warning(
            "prefixes with the salts %s are not saved: a file can name None, bool, int, str, bytes and tuples of them.",
            skipped,
        )
    return {Root(names[root[0]], *root): node for root, node in sorted(found.items(), key=lambda item: repr(item[0]))}


def _describe(storage: KVStorage, model: Any, config: dict[str, Any], weights: str, roots: list[Root]) -> Description:
    return Description(
        model_class=type(model).__name__,
        config=config,
        weights=weights,
        dtype=dtype_name(storage.dtype),
        kv_dtype=dtype_name(storage.kv_dtype),
        block_size=storage.block_size,
        layers=dict(sorted(storage.layout.specs.items())),
        roots=roots,
    )


def _copy(
    storage: KVStorage,
    host: HostStorage | None,
    description: Description,
    branches: list[Branch],
    nodes: list[PrefixNode],
) -> PrefixFile:
    """K and V of all blocks, on the CPU. Groups of one window keep the same tokens; what one of them lacks is left out."""
    windows = description.windows
    groups = [[i for i, other in enumerate(storage.layout.windows) if other == window] for window in windows]
    places = [list(zip(node.blocks, node.host_blocks, strict=True)) for node in nodes]
    holds = [[all(row[group] != (None, None) for group in of_window) for of_window in groups] for row in places]
    layers = {}
    for layer, spec in description.layers.items():
        group, column = storage.layout.places[layer].group, windows.index(spec.window)
        wanted = [row[group] for row, held in zip(places, holds, strict=True) if held[column]]
        layers[layer] = read_anywhere(storage, host, layer, wanted)
    return PrefixFile(description, branches, holds, layers)


def _by_group(storage: KVStorage, file: PrefixFile) -> list[list[bool]]:
    """Per branch whether the file has K and V for each layer group of this pool."""
    columns = [file.description.windows.index(window) for window in storage.layout.windows]
    return [[held[column] for column in columns] for held in file.holds]


def _writer(storage: KVStorage, file: PrefixFile) -> Callable[[Placing], None]:
    """Copies the file's content into the blocks of branches."""
    windows = file.description.windows
    rows = [{branch: row for row, branch in enumerate(file.holding(column))} for column in range(len(windows))]

    def write_all(placing: Placing) -> None:
        for layer, spec in file.description.layers.items():
            group, known = storage.layout.places[layer].group, rows[windows.index(spec.window)]
            mine = [(block, known[branch]) for branch, of, block in placing if of == group]
            if mine:
                write_blocks(storage.layers[layer], [b for b, _ in mine], file.layers[layer], [row for _, row in mine])

    return write_all
