"""Which adapters requests may ask for, and which of them are in memory."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters import BASE
from ..adapters.folders import FolderLoader, require_folder
from ..adapters.tuners import is_invoked, merged, names_in
from ..compat import logger
from ..errors import InvalidRequestError, PagedCacheError
from ..pool import BlockPool
from .request import Request


class AdapterStore:
    """The adapters in a model, and registered folders that are loaded when a request first needs them.

    Those that peft loaded are the user's; of the others the least recently used one makes room.

    Args:
        model: A `PeftModel`, or a transformers model.
        pool: Its pool.
        max_loras: Most registered adapters in memory; None for any number.

    Attributes:
        num_loads: How often an adapter was loaded from its folder.
    """

    def __init__(self, model: torch.nn.Module, pool: BlockPool, max_loras: int | None = None) -> None:
        self._pool, self._max_loras = pool, max_loras
        self._loader = FolderLoader(model, pool.device)
        self._lock = threading.RLock()
        self._folders: dict[str, Path] = {}
        self._dropped: set[str] = set()
        self._loaded: OrderedDict[str, set[Request]] = OrderedDict()
        self._errors: weakref.WeakKeyDictionary[Request, Exception] = weakref.WeakKeyDictionary()
        self._tuners: list[Any] = []
        self._names: set[str] = set()
        self._invoked: set[str] = set()
        self.num_loads = 0

    @property
    def loaded(self) -> list[str]:
        """Registered adapters that are in memory, the least recently used first."""
        return list(self._loaded)

    def register(self, folders: Mapping[str, str | Path]) -> None:
        """Requests may name these from now on.

        Raises:
            InvalidRequestError: A name is taken or cannot be one, or a folder holds no adapter; none was registered.
        """
        if not isinstance(folders, Mapping):
            raise InvalidRequestError(f"lora_modules={folders!r:.100}: a dictionary is needed, {{name: folder}}.")
        found = {name: require_folder(name, path) for name, path in folders.items()}
        with self._lock:
            for name in found:
                if name in self._dropped:
                    raise InvalidRequestError(f"adapter {name!r} was dropped, but requests of it are not over yet.")
                if name in self._folders or name in self._present():
                    raise InvalidRequestError(
                        f"adapter {name!r} is there already: drop it first, or take another name."
                    )
            self._folders.update(found)

    def drop(self, name: str) -> None:
        """No new request may name it; it leaves memory with its last one, see `sweep`.

        Raises:
            InvalidRequestError: No such folder was registered.
        """
        with self._lock:
            if name not in self._folders or name in self._dropped:
                raise InvalidRequestError(f"adapter {name!r} was not registered; registered are {self._registered()}.")
            self._dropped.add(name)

    def require(self, name: str | None) -> None:
        """Looks whether a request may name this adapter.

        Raises:
            InvalidRequestError: There is none of this name, or adapters are merged.
        """
        if name is None:
            return
        with self._lock:
            present = (self._names if name in self._names else self._present()) - self._dropped
            error = self._why_not(name, present)
        if error is not None:
            raise error

    def bring(self, request: Request) -> bool:
        """Loads the request's adapter if it is not in memory, and keeps it there until `let_go`; whether it was loaded."""
        name, num_loads = request.adapter_name, self.num_loads
        if name is None or name not in self._folders:
            return False
        with self._lock:
            try:
                if name not in self._loaded and name not in self._present():
                    self._load(name)
            except Exception as error:  # noqa: BLE001 (whatever is wrong with a folder is its requests' affair)
                self._errors[request] = _of_folder(name, self._folders[name], error)
            if name in self._loaded:
                self._loaded.move_to_end(name)
                self._loaded[name].add(request)
        return self.num_loads != num_loads

    def let_go(self, request: Request) -> None:
        """The request's adapter may leave memory, as far as this one is concerned."""
        self._loaded.get(request.adapter_name or "", set()).discard(request)

    def errors(self, requests: Iterable[Request]) -> list[tuple[Request, Exception]]:
        """Those of the requests that cannot be computed now, and why."""
        by_name: dict[str, Exception | None] = {}
        found = []
        for request in requests:
            name = request.adapter_name
            if name is None:
                continue
            if name not in by_name:
                by_name[name] = self._why_not(name, self._look())
            error = self._errors.get(request, by_name[name])
            if error is not None:
                found.append((request, error))
        return found

    def sweep(self, requests: Iterable[Request]) -> None:
        """Forgets dropped adapters that none of these requests names."""
        if not self._dropped:
            return
        named = {request.adapter_name for request in requests}
        with self._lock:
            for name in self._dropped - named:
                self._unload(name)
                self._dropped.discard(name)
                del self._folders[name]

    def close(self) -> None:
        """Takes all that was loaded from folders out of the model."""
        with self._lock:
            for name in list(self._loaded):
                self._unload(name)

    def _load(self, name: str) -> None:
        while self._max_loras is not None and len(self._loaded) >= self._max_loras:
            idle = next((other for other, requests in self._loaded.items() if not requests), None)
            if idle is None:
                raise InvalidRequestError(f"max_loras={self._max_loras} adapters are in use: {self.loaded}.")
            self._unload(idle)
        self._loader.load(name, self._folders[name])
        self._loaded[name] = set()
        self.num_loads += 1
        self._present()

    def _unload(self, name: str) -> None:
        if name in self._loaded:
            self._loader.unload(name)
            del self._loaded[name]
            self._present()

    def _why_not(self, name: str, present: set[str]) -> InvalidRequestError | None:
        is_registered = name in self._folders and name not in self._dropped
        if name != BASE and name not in present and not is_registered:
            known = sorted({*present, *self._registered()})
            return InvalidRequestError(
                f"adapter_name={name!r}: there is no such adapter; known are {known} and {BASE!r}."
            )
        if name in self._invoked:
            return InvalidRequestError(
                f"adapter_name={name!r} is an aLoRA, which tokens of the prompt switch on: the batcher does not look for them. "
                "Use model.generate."
            )
        names = merged(self._tuners)
        if names:
            return InvalidRequestError(
                f"adapter_name={name!r}: {list(names)} are merged into the base weights, which all rows share: call "
                "model.unmerge_adapter() first."
            )
        return None

    def _present(self) -> set[str]:
        """The adapters in the model's layers."""
        self._pool.light_key()  # looks at the modules
        return self._look()

    def _look(self) -> set[str]:
        """The same, if nobody changed the modules since they were looked at."""
        weights = self._pool.weights
        if weights is not None and weights.tuners is not self._tuners:
            self._tuners = weights.tuners
            held = [(tuner, name) for tuner in self._tuners for name in names_in(tuner)]
            self._names = {name for _, name in held}
            self._invoked = {name for tuner, name in held if is_invoked(tuner, name)}
            if any(module.training for tuner in self._tuners for module in tuner.modules()):
                logger.warning("adapters are in training mode, so that no prefix is shared: call model.eval()")
        return self._names

    def _registered(self) -> list[str]:
        return sorted(self._folders.keys() - self._dropped)


def _of_folder(name: str, folder: Path, error: Exception) -> Exception:
    """An error that says which adapter it is about."""
    if isinstance(error, PagedCacheError):
        return error
    said = PagedCacheError(f"adapter {name!r} cannot be loaded from {folder}: {type(error).__name__}: {error}")
    said.__cause__ = error
    return said
