"""Tensors that stand for data elsewhere: how a block table travels through `attention_interface(query, key, value)`."""

from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only


class Source(Protocol):
    """Can make the tensor that a `LazyTensor` stands for."""

    def dense(self) -> torch.Tensor:
        """The real tensor, of the shape, strides, dtype and device that were announced."""
        ...


class LazyTensor(torch.Tensor):
    """Has a shape, a dtype and a device but no data: any torch operation makes its source produce the real tensor, once.

    Code that knows the class takes the `source` and never pays for the dense tensor; all other code is right without
    knowing it.
    """

    source: Source
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        source: Source,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        strides: tuple[int, ...] | None = None,
    ) -> "LazyTensor":
        """A tensor without data; `strides` are those the real one has, if it is not contiguous."""
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)
        tensor.source, tensor._dense = source, None
        return tensor

    def dense(self) -> torch.Tensor:
        """The real tensor; made on the first call."""
        if self._dense is None:
            self._dense = self.source.dense()
        return self._dense

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.source}, shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyTensor, lambda t: t.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


class PagedTensor(LazyTensor):
    """Keys or values `[batch, kv_heads, kv_length, head_dim]` whose source is a view of a layer's blocks."""
