"""One at a time: who computes with a model, reads which of its adapters are active, or loads some."""

import threading
import weakref

import torch

_locks: "weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def lock_of(model: torch.nn.Module) -> "threading.RLock":
    """The lock of a transformers model, which several batchers may share."""
    with _lock:
        return _locks.setdefault(model, threading.RLock())
