"""Which adapters requests may ask for, and which of them are in memory."""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters import BASE
from ..adapters.exclusive import lock_of
from ..adapters.folders import FolderLoader, require_folder
from ..adapters.tuners import is_invoked, merged, names_in
from ..compat import base_model, logger
from ..errors import InvalidRequestError, PagedCacheError
from ..pool import BlockPool
from ..wording import shown
from .request import Request

OURS = "pagedcache_"
_numbers = itertools.count()


def _new_key() -> str:
    return f"{OURS}{next(_numbers):06d}"  # of one length, since peft looks for names inside of others


@dataclass(eq=False)
class Registered:
    """An adapter in a folder.

    Attributes:
        name: As requests call it.
        path: The folder.
        key: As the model calls it while it is in memory: no other adapter ever has that name.
        requests: Those that named it, as far as they are still there.
        running: Those of them that run.
    """

    name: str
    path: Path
    key: str = field(default_factory=_new_key)
    requests: "weakref.WeakSet[Request]" = field(default_factory=weakref.WeakSet)
    running: set[Request] = field(default_factory=set)

    @property
    def is_needed(self) -> bool:
        """Whether a request that named it is not over."""
        return any(request.handle is None or not request.handle.done for request in self.requests)

    def say(self, error: Exception) -> Exception:
        """An error of loading that speaks of this adapter by its name."""
        text = str(error).replace(self.key, self.name)
        if isinstance(error, InvalidRequestError):
            return InvalidRequestError(text)
        said = PagedCacheError(
            f"adapter {self.name!r} cannot be loaded from {self.path}: {type(error).__name__}: {text}"
        )
        said.__cause__ = error
        return said


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
        self._loader = FolderLoader.of(model, pool.device)
        self._lock, self._model_lock = threading.RLock(), lock_of(base_model(model))
        self._offered: dict[str, Registered] = {}
        self._by_key: dict[str, Registered] = {}
        self._dropped: list[Registered] = []
        self._loaded: OrderedDict[str, Registered] = OrderedDict()
        self._errors: weakref.WeakKeyDictionary[Request, Exception] = weakref.WeakKeyDictionary()
        self._tuners: list[Any] = []
        self._held: set[str] = set()
        self._invoked: set[str] = set()
        self.num_loads = 0

    @property
    def loaded(self) -> list[str]:
        """Registered adapters that are in memory, the least recently used first."""
        return [adapter.name for adapter in self._loaded.values()]

    def register(self, folders: Mapping[str, str | Path]) -> None:
        """Requests may name these from now on.

        Raises:
            InvalidRequestError: A name is taken or cannot be one, or a folder holds no adapter; none was registered.
        """
        if not isinstance(folders, Mapping):
            raise InvalidRequestError(f"lora_modules={shown(folders)}: a dictionary is needed, {{name: folder}}.")
        if not folders:
            return
        self._loader.require_weights()
        found = {name: Registered(name, require_folder(name, path)) for name, path in folders.items()}
        with self._lock:
            for name in found:
                if name in self._offered or name in self._present():
                    raise InvalidRequestError(
                        f"adapter {name!r} is there already: drop it first, or take another name."
                    )
            self._offered.update(found)
            self._by_key.update({adapter.key: adapter for adapter in found.values()})

    def drop(self, name: str) -> None:
        """No new request may name it; it leaves memory with its last one, see `sweep`.

        Raises:
            InvalidRequestError: No such folder was registered.
        """
        with self._lock:
            if name not in self._offered:
                raise InvalidRequestError(
                    f"adapter {name!r} was not registered; registered are {sorted(self._offered)}."
                )
            self._dropped.append(self._offered.pop(name))

    def enter(self, request: Request) -> None:
        """Notes which adapter a new request is computed with.

        Raises:
            InvalidRequestError: There is none of this name, or adapters are merged.
        """
        name = request.asked_adapter
        if name is None:
            return
        with self._lock:
            adapter = self._offered.get(name)
            if adapter is None or not self._tuners:
                self._present()
            request.adapter_name = name if adapter is None else adapter.key
            error = self._why_not(request)
            if error is not None:
                raise error
            if adapter is not None:
                adapter.requests.add(request)

    def bring(self, request: Request) -> bool:
        """Loads the request's adapter if it is not in memory, and keeps it there until `let_go`; whether it was loaded."""
        adapter, num_loads = self._by_key.get(request.adapter_name or ""), self.num_loads
        if adapter is None:
            return False
        with self._lock:
            self._look()
            try:
                if adapter.key not in self._loaded or adapter.key not in self._held:  # somebody may have deleted it
                    self._load(adapter)
            except Exception as error:  # noqa: BLE001 (whatever is wrong with a folder is its requests' affair)
                self._errors[request] = adapter.say(error)
            else:
                self._loaded.move_to_end(adapter.key)
                adapter.running.add(request)
        return self.num_loads != num_loads

    def let_go(self, request: Request) -> None:
        """The request's adapter may leave memory, as far as this one is concerned."""
        adapter = self._by_key.get(request.adapter_name or "")
        if adapter is not None:
            adapter.running.discard(request)

    def errors(self, requests: Iterable[Request]) -> list[tuple[Request, Exception]]:
        """Those of the requests that cannot be computed now, and why."""
        by_name: dict[str, Exception | None] = {}
        found = []
        for request in requests:
            name = request.adapter_name
            if name is None:
                continue
            if name not in by_name:
                self._look()
                by_name[name] = self._why_not(request)
            error = self._errors.get(request, by_name[name])
            if error is not None:
                found.append((request, error))
        return found

    def sweep(self) -> None:
        """Forgets dropped adapters that no request needs any more."""
        if not self._dropped:
            return
        with self._lock:
            for adapter in [adapter for adapter in self._dropped if not adapter.is_needed]:
                self._unload(adapter)
                self._dropped.remove(adapter)
                del self._by_key[adapter.key]

    def close(self) -> None:
        """Takes all that was loaded from folders out of the model."""
        with self._lock:
            for adapter in list(self._loaded.values()):
                self._unload(adapter)

    def _load(self, adapter: Registered) -> None:
        self._loaded.pop(adapter.key, None)
        while self._max_loras is not None and len(self._loaded) >= self._max_loras:
            idle = next((other for other in self._loaded.values() if not other.running), None)
            if idle is None:
                raise InvalidRequestError(f"max_loras={self._max_loras} adapters are in use: {self.loaded}.")
            self._unload(idle)
        self._loaded[adapter.key] = adapter
        try:
            with self._model_lock:
                self._loader.load(adapter.key, adapter.path)
        except BaseException:
            self._unload(adapter)
            raise
        self.num_loads += 1
        self._present()
        logger.info("adapter %s loaded from %s", adapter.name, adapter.path)

    def _unload(self, adapter: Registered) -> None:
        if adapter.key in self._loaded:
            with self._model_lock:
                self._loader.unload(adapter.key)
            del self._loaded[adapter.key]
            self._present()
            logger.info("adapter %s unloaded", adapter.name)

    def _why_not(self, request: Request) -> InvalidRequestError | None:
        name, asked = request.adapter_name, request.asked_adapter
        adapter = self._by_key.get(name or "")
        is_there = name in self._held if adapter is None or adapter.running else True  # or loaded when it is needed
        if name != BASE and (not is_there or (adapter is None and str(name).startswith(OURS))):
            known = sorted({*self._present_names(), *self._offered})
            return InvalidRequestError(
                f"adapter_name={asked!r}: there is no such adapter; known are {known} and {BASE!r}."
            )
        if name in self._invoked:
            return InvalidRequestError(
                f"adapter_name={asked!r} is an aLoRA, which tokens of the prompt switch on: the batcher does not look for "
                "them. Use model.generate."
            )
        names = merged(self._tuners)
        if names:
            return InvalidRequestError(
                f"adapter_name={asked!r}: {list(names)} are merged into the base weights, which all rows share: call "
                "model.unmerge_adapter() first."
            )
        return None

    def _present(self) -> set[str]:
        """The user's adapters in the model's layers."""
        with self._model_lock:
            self._pool.light_key()  # looks at the modules
        self._look()
        return self._present_names()

    def _present_names(self) -> set[str]:
        return {name for name in self._held if not name.startswith(OURS)}

    def _look(self) -> None:
        """Notes which adapters there are, if nobody changed the modules since they were looked at."""
        weights = self._pool.weights
        if weights is None or weights.tuners is self._tuners:
            return
        tuners = weights.tuners
        held = [(tuner, name) for tuner in tuners for name in names_in(tuner)]
        self._held = {name for _, name in held}
        self._invoked = {name for tuner, name in held if is_invoked(tuner, name)}
        if any(module.training for tuner in tuners for module in tuner.modules()):
            logger.warning("adapters are in training mode, so that no prefix is shared: call model.eval()")
        self._tuners = tuners
