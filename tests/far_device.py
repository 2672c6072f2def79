"""Devices that machines with only a CPU have: `far:0` and `far:1`, whose tensors are CPU tensors behind a wall.

An operation on tensors of two devices fails as it does on GPUs. Importing this registers the backend in the whole process:
do it in one of its own.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")

MAY_MIX = {"_to_copy", "copy_", "index", "index_put_"}
"""Operations that take tensors of the CPU beside those of another device, as on GPUs."""


class Far(torch.Tensor):
    """A tensor on a far device; `near` is where its data is."""

    near: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: torch.Tensor, device: Any = None, requires_grad: bool | None = None) -> Any:
        """The wall around `near`; with `requires_grad` a parameter, as accelerate makes them by their class."""
        if requires_grad is not None:
            return torch.nn.Parameter(near, requires_grad)
        options = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, near.shape, device=_indexed(device), **options)
        tensor.near = near
        return tensor

    def __repr__(self) -> str:
        return f"Far({self.near}, {self.device})"

    def tolist(self) -> Any:
        """As of any tensor; torch has it for its own class only."""
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes on the CPU; results are behind the wall, and the tensors that came in are themselves."""
        kwargs, walls, devices = dict(kwargs or {}), {}, set()

        def behind(x: Any) -> Any:
            if isinstance(x, Far):
                walls[id(x.near)] = x
            if isinstance(x, torch.Tensor) and (x.dim() or isinstance(x, Far)):
                devices.add(x.device)
            return x.near if isinstance(x, Far) else x

        target = kwargs.pop("device", None)
        near_args, near_kwargs = tree_map(behind, (args, kwargs))
        far = {device for device in devices if device.type == "far"}
        name = func.overloadpacket.__name__
        if (len(devices) > 1 and name not in MAY_MIX) or (len(far) > 1 and name != "copy_"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {devices}.")
        device = torch.device(target) if target is not None else next(iter(far))
        if target is not None:
            near_kwargs["device"] = "cpu" if device.type == "far" else device

        def outside(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or device.type != "far":
                return x
            return walls[id(x)] if id(x) in walls else Far(x, device)

        return tree_map(outside, func(*near_args, **near_kwargs))


def _indexed(device: torch.device) -> torch.device:
    return torch.device(device.type, device.index or 0)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    return Far(torch.empty_strided(size, stride, dtype=dtype), device)


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    return Far(torch.empty(size, dtype=dtype), device)


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> torch.Tensor:
    getattr(target, "near", target).copy_(getattr(source, "near", source))
    return target


LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
