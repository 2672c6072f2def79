"""`patch` and `unpatch`: attention of one model reads blocks in place."""

import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial, update_wrapper, wraps
from types import MethodType, TracebackType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .compat import (
    HOOKED_FORWARD,
    base_model,
    decoder_config,
    layer_configs,
    logger,
    not_traced,
    uses_attention_interface,
)
from .errors import UnsupportedModelError
from .forward import begin_forward, find_cache
from .implementation import register, unregister
from .model_spec import model_spec

_patches: "weakref.WeakKeyDictionary[torch.nn.Module, _Patch]" = weakref.WeakKeyDictionary()

_holders: "weakref.WeakKeyDictionary[torch.nn.Module, set[object]]" = weakref.WeakKeyDictionary()
"""By model: who needs the patch. It is there while there is one; `patch` and `unpatch` speak for `_USER`."""

_USER = "patch"
_lock = threading.RLock()


class Patched(AbstractContextManager["Patched"]):
    """What `patch` returns: leaving its `with` block unpatches the model, unless it was patched before."""

    def __init__(self, model: torch.nn.Module, is_owner: bool) -> None:
        self.model, self._is_owner = model, is_owner

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_owner:
            unpatch(self.model)


def patch(model: torch.nn.Module) -> Patched:
    """Lets the model's attention read a `PagedCache`'s blocks in place, and prompts be reused across calls.

    Patching twice is the same as once. Also a context manager: `with patch(model): ...`.

    Raises:
        UnsupportedModelError: `model` is no transformers model.
    """
    inner = _require_model(model)
    return Patched(inner, is_owner=_add_holder(inner, _USER))


def unpatch(model: torch.nn.Module) -> None:
    """Takes `patch` back, without a trace. A model that is not patched stays as it is.

    While a `ContinuousBatcher` is open, its model stays patched until the last one is closed.

    Raises:
        UnsupportedModelError: As `patch`.
    """
    inner = _require_model(model)
    if _find(inner) is not None:
        _remove_holder(inner, _USER)
        if _find(inner) is not None:
            logger.info("%s stays patched until its last open batcher is closed", type(inner).__name__)


def hold(model: torch.nn.Module) -> Callable[[], None]:
    """Keeps a transformers model patched, whatever others do, until the function is called that this returns."""
    holder = object()
    _add_holder(model, holder)
    return partial(_remove_holder, model, holder)


def is_patched(model: torch.nn.Module) -> bool:
    """Whether `patch` is in effect."""
    inner = base_model(model)
    return isinstance(inner, PreTrainedModel) and _find(inner) is not None


def _require_model(model: Any) -> PreTrainedModel:
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is no transformers model: nothing in it can be patched.")
    return inner


def _add_holder(model: torch.nn.Module, holder: object) -> bool:
    """Patches a model that is not patched yet; whether the holder is a new one."""
    with _lock:
        _find(model)
        holders = _holders.setdefault(model, set())
        is_new = holder not in holders
        holders.add(holder)  # first: the garbage collector may let another one go at any time
        if model not in _patches:
            _patches[model] = _Patch(model)
        return is_new


def _remove_holder(model: torch.nn.Module, holder: object) -> None:
    """Unpatches a model that nobody else holds."""
    with _lock:
        holders = _holders.get(model, set())
        holders.discard(holder)
        if not holders and model in _patches:
            _patches[model].remove(model)
            del _patches[model]


def _find(model: torch.nn.Module) -> "_Patch | None":
    """The patch of a model. A copy of a patched model carries the hooks; its patch is made when it is first asked for."""
    if model not in _patches:
        with _lock:
            hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _Before)]
            if hooks and model not in _patches:
                _holders[model] = {_USER}
                _patches[model] = _Patch(model, copied_from=hooks[0])
    return _patches.get(model)


class _Patch:
    """Two hooks, a guard around `forward`, and another implementation name if attention goes through the interface."""

    def __init__(self, model: Any, copied_from: "_Before | None" = None) -> None:
        decoder = decoder_config(model)
        prior = copied_from.prior if copied_from else decoder._attn_implementation
        reason = _why_dense(model, decoder)
        lazy = reason is None
        if reason is not None:
            logger.info("attention of %s runs on dense K and V: %s", type(model).__name__, reason)
        self._unregister = weakref.finalize(model, unregister, register(decoder, prior)) if lazy else None
        if self._unregister is not None:
            self._unregister.atexit = False
        if copied_from is None:
            model.register_forward_pre_hook(_Before(lazy, prior), with_kwargs=True, prepend=True)
            model.register_forward_hook(_after, with_kwargs=True, always_call=True)
            own = vars(model).get("forward")
            model.forward = _OwnGuard(_call, model, own) if own else MethodType(_guarded(type(model).forward), model)
            if own:
                update_wrapper(model.forward, own)

    def remove(self, model: torch.nn.Module) -> None:
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Before) or hook is _after]:
                del hooks[key]
                for names in (
                    "_forward_pre_hooks_with_kwargs",
                    "_forward_hooks_with_kwargs",
                    "_forward_hooks_always_called",
                ):
                    getattr(model, names).pop(key, None)
        _remove_guard(model)
        if self._unregister is not None:
            self._unregister()


def _why_dense(model: Any, decoder: PreTrainedConfig) -> str | None:
    """Why attention of a model can never read blocks in place; None if it can."""
    if not model_spec(model.config).has_plain_attention:
        return "keys are chosen between cache and attention"
    if not uses_attention_interface(model, decoder):
        return "its layers write their attention out"
    if any(getattr(config, "kv_lora_rank", None) is not None for config in layer_configs(decoder, 1)):
        return "its keys and values are made from cached latents"
    return None


@dataclass(frozen=True)
class _Before:
    """Hook before a forward.

    Attributes:
        lazy: Whether attention knows `PagedTensor`.
        prior: The attention implementation before `patch`.
    """

    lazy: bool
    prior: str

    @not_traced
    def __call__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _find(model)
        inputs = kwargs
        if args:
            inputs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        cache = find_cache(inputs)
        if cache is None:
            return None
        with cache._state.holding(model):
            return (), begin_forward(model, cache, inputs, self.lazy)


@not_traced
def _after(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Hook after a forward, also after one that raised an `Exception`."""
    cache = find_cache(kwargs)
    if cache is not None:
        state = cache._state
        try:
            state.abort() if output is None else state.finish()
        finally:
            state.let_go()


_guards: set[Any] = set()


@cache
def _guarded(forward: Any) -> Any:
    """`forward` that takes its step back on anything that stops it: torch calls no hook after a `KeyboardInterrupt`."""

    @wraps(forward)
    def guarded(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        except BaseException:
            _after(self, args, kwargs, None)  # type: ignore[arg-type]
            raise

    _guards.add(guarded)
    return guarded


class _OwnGuard(partial[Any]):
    """The same around a forward that the model itself has, such as accelerate's."""


def _call(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    except BaseException:
        _after(model, args, kwargs, None)
        raise


def _remove_guard(model: Any) -> None:
    """Wherever it is by now: a hook of accelerate's that was added later is around it."""
    forward, hooked = vars(model).get("forward"), vars(model).get(HOOKED_FORWARD)
    if isinstance(forward, _OwnGuard):
        model.forward = forward.args[1]
    elif getattr(forward, "__func__", None) in _guards:
        del model.forward
    elif getattr(hooked, "__func__", None) in _guards:
        plain = MethodType(type(model).forward, model)
        setattr(model, HOOKED_FORWARD, plain)
        model.forward.__wrapped__ = plain
