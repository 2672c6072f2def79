"""`prepack_weights`: linear layers compute with copies of their weights in oneDNN's layout."""

import threading
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeGuard

import torch

from .adapters import tuners as peft_layers
from .compat import base_model, linear_with_packed, logger, offloaded_weights, packed_dtypes, packed_weight
from .errors import InvalidRequestError
from .wording import shown

MIN_PRODUCTS = 2**19
"""Multiplications of a call from which on oneDNN is faster: it takes some 10 us more to be called."""
NUM_SAMPLES = 16
"""Elements of a weight that are compared at every call: writes through `.data` show in no counter."""

_packings: "weakref.WeakKeyDictionary[torch.nn.Module, _Packing]" = weakref.WeakKeyDictionary()
_lock = threading.RLock()


class Prepacked(AbstractContextManager["Prepacked"]):
    """What `prepack_weights` returns: `remove`, or leaving its `with` block, leaves the model as it was.

    Attributes:
        num_layers: Linear layers that are prepacked.
    """

    def __init__(self, layers: Iterable[torch.nn.Linear] = ()) -> None:
        self._layers: list[torch.nn.Linear] = []
        self._holder = object()
        try:
            for layer in layers:
                self._layers.append(layer)
                _hold(layer, self._holder)
        except BaseException:
            self.remove()
            raise
        self.num_layers = len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take now; those of other holders of the same layers are the same ones."""
        packings = [_packings.get(layer) for layer in self._layers]
        return sum(packing.nbytes for packing in packings if packing is not None)

    def remove(self) -> None:
        """Gives the copies up, those of layers that nobody else holds. Twice is the same as once."""
        while self._layers:
            _let_go(self._layers.pop(), self._holder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def prepack_weights(model: torch.nn.Module) -> Prepacked:
    """Lets a model's linear layers compute with copies of their weights that oneDNN laid out for this CPU.

    The same results but for the order of sums, faster, for a second copy of these weights in memory. Layers are
    `torch.nn.Linear` itself, on the CPU, in float32, or bfloat16 where the CPU has it; all others, and calls that need
    gradients or are compiled, run as before. Changed weights are noticed and laid out anew. Only writes through `.data` to a
    few elements are not: call `BlockPool.invalidate` behind them. Parameters, `state_dict`, copies and pickles of the
    model are those of the model itself.

    Also a context manager: `with prepack_weights(model): ...`. Each call has to be removed for itself.

    Raises:
        InvalidRequestError: `model` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidRequestError(f"model={shown(model)}: a torch.nn.Module is needed, such as a PreTrainedModel.")
    name = type(base_model(model)).__name__
    reason = _why_not(model)
    layers = [] if reason else [layer for layer in peft_layers.split(model)[0] if _can_be(layer)]
    if not layers:
        reason = reason or "none is a plain torch.nn.Linear on the CPU, of a dtype that oneDNN computes in here"
        logger.info("linear layers of %s stay as they are: %s", name, reason)
        return Prepacked()
    prepacked = Prepacked(layers)
    size = prepacked.nbytes / 2**20
    logger.info("%s computes with copies of the weights of %d linear layers: %.1f MiB", name, len(layers), size)
    return prepacked


def forget_copies(model: torch.nn.Module) -> None:
    """The model's weights may be other ones now: they are laid out again when they are next used."""
    for layer in model.modules() if _packings else ():
        packing = _packings.get(layer)
        if packing is not None:
            packing.copy = None


class PrepackedLinear(torch.nn.Linear):
    """What a layer is while it is prepacked. Nothing is kept in the layer itself, and its copies are plain layers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As before; by oneDNN where that is possible and pays."""
        packed = None if torch.compiler.is_compiling() else _packed_for(self, input)
        if packed is None:
            return super().forward(input)
        return linear_with_packed(input, packed, self.bias)

    def _get_name(self) -> str:
        return "Linear"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return object.__new__, (torch.nn.Linear,), *reduced[2:]


class _Packing:
    """Who holds one layer, and its copy."""

    def __init__(self) -> None:
        self.holders: set[object] = set()
        self.copy: _Copy | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.copy is None else self.copy.weight.nbytes

    def packed(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The copy of a weight as it is now; None for one that cannot have any."""
        copy = self.copy
        if copy is None or not copy.is_of(weight):
            with _lock:  # others may have waited for the same
                copy = self.copy
                if copy is None or not copy.is_of(weight):
                    copy = self.copy = _Copy(weight) if _is_packable(weight) else None
        return None if copy is None else copy.packed


class _Copy:
    """A weight in oneDNN's layout, and what tells that the weight is still the same."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self._version, self._pointer = weight, weight._version, weight.data_ptr()
        flat = weight.detach().view(-1).view(torch.int32 if weight.itemsize == 4 else torch.int16)
        self._samples = flat[:: max(flat.numel() // (NUM_SAMPLES + 1), 1)].numpy()
        self._sampled = self._samples.tobytes()
        self.packed = packed_weight(weight.detach())

    def is_of(self, weight: torch.Tensor) -> bool:
        return (
            weight is self.weight
            and weight.data_ptr() == self._pointer  # before its memory is read
            and weight._version == self._version
            and self._samples.tobytes() == self._sampled
        )


def _hold(layer: torch.nn.Linear, holder: object) -> None:
    with _lock:
        packing = _packings.setdefault(layer, _Packing())
        packing.holders.add(holder)
        packing.packed(layer.weight)
        if type(layer) is torch.nn.Linear:
            layer.__class__ = PrepackedLinear


def _let_go(layer: torch.nn.Linear, holder: object) -> None:
    with _lock:
        packing = _packings.get(layer)
        if packing is None:
            return
        packing.holders.discard(holder)
        if not packing.holders:
            del _packings[layer]
            if type(layer) is PrepackedLinear:
                layer.__class__ = torch.nn.Linear  # type: ignore[assignment]  # narrowed to the other one


def _why_not(model: torch.nn.Module) -> str | None:
    """Why no layer of a model can be prepacked; None if some may be."""
    if not packed_dtypes():
        return "torch has no oneDNN here"
    return "torch.compile made their code" if hasattr(model, "_orig_mod") else None


def _can_be(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a layer is a plain one, whose weight stays where it is."""
    weight = layer._parameters.get("weight")
    is_plain = type(layer) in (torch.nn.Linear, PrepackedLinear) and not _is_hooked(layer)
    return is_plain and weight is not None and _is_packable(weight)


def _is_hooked(layer: torch.nn.Module) -> bool:
    """Whether something is around its forward, as accelerate's hooks are, which move weights."""
    return "forward" in vars(layer) or offloaded_weights(layer) is not None


def _is_packable(weight: torch.Tensor) -> bool:
    return (
        type(weight) is torch.nn.Parameter
        and weight.is_cpu
        and weight.dtype in packed_dtypes()
        and weight.is_contiguous()
        and weight.numel() > 0
        and not weight.is_inference()  # which has no version counter
    )


def _packed_for(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor | None:
    """The weight for these inputs; None where the layer is to compute by itself."""
    packing, weight = _packings.get(layer), layer._parameters.get("weight")
    if packing is None or weight is None or "forward" in vars(layer) or not _suits(x, weight, layer.bias):
        return None
    return packing.packed(weight)


def _suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        type(x) is torch.Tensor
        and x.numel() * weight.shape[0] >= MIN_PRODUCTS
        and x.dtype is weight.dtype
        and (bias is None or bias.dtype is weight.dtype)
        and x.is_cpu
        and x.layout is torch.strided
        and x.shape[-1] == weight.shape[1]
        and not (torch.is_grad_enabled() and _has_gradient(x, weight, bias))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_mkldnn_enabled()
    )


def _has_gradient(*tensors: torch.Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
