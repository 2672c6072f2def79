"""The `"paged_cache"` mask function: says what a mask hides, and makes the 4-D tensor only if somebody looks at it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface

from .paged_tensor import LazyTensor

MaskFunction = Callable[..., Any]

_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_CHUNK = masking_utils.chunked_overlay(1, torch.zeros(1)).__code__


@dataclass(frozen=True)
class MaskPattern:
    """What a causal mask hides besides the future and padding: all but `window` tokens, or other chunks."""

    window: int | None = None
    chunk: int | None = None


def mask_pattern(mask_function: MaskFunction) -> MaskPattern | None:
    """The pattern of one of transformers' mask functions; None for any that does more (image spans, packing, ...)."""
    if mask_function is masking_utils.causal_mask_function:
        return MaskPattern()
    variables = _closure(mask_function)
    if getattr(mask_function, "__code__", None) is not _AND:
        return None
    pattern, is_causal = MaskPattern(), False
    for part in variables["mask_functions"]:
        code = getattr(part, "__code__", None)
        if part is masking_utils.causal_mask_function:
            is_causal = True
        elif code is _WINDOW and pattern.window is None:
            pattern = MaskPattern(_closure(part)["sliding_window"], pattern.chunk)
        elif code is _CHUNK and pattern.chunk is None:
            pattern = MaskPattern(pattern.window, _closure(part)["chunk_size"])
        else:
            return None
    return pattern if is_causal else None


def _closure(function: MaskFunction) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return dict(zip(names, (cell.cell_contents for cell in getattr(function, "__closure__", None) or ()), strict=True))


@dataclass(frozen=True, eq=False)
class MaskSource:
    """What it takes to make the mask of the attention that the model used before `patch`."""

    pattern: MaskPattern
    make: MaskFunction
    kwargs: dict[str, Any]

    def exact(self) -> torch.Tensor | None:
        """The mask as that attention expects it; it may be None."""
        return self.make(**self.kwargs)  # type: ignore[no-any-return]

    def dense(self) -> torch.Tensor:
        """The same for code that wants a tensor."""
        mask = self.exact()
        if mask is None:
            mask = masking_utils.sdpa_mask(**{**self.kwargs, "allow_is_causal_skip": False})
        assert mask is not None
        return mask.contiguous()


class LazyMask(LazyTensor):
    """`[batch, 1, q_length, kv_length]` of a `MaskPattern` and left padding.

    Moving it to another device, as accelerate does from layer to layer, moves nothing but says where it will be made.
    """

    def exact(self) -> Any:
        """The mask as the attention before `patch` expects it, possibly None."""
        return self._here(self.source.exact())  # type: ignore[attr-defined]

    def dense(self) -> torch.Tensor:
        """The mask as a tensor on this device; made on the first call."""
        if self._dense is None:
            self._dense = self._here(self.source.dense())
        return self._dense

    def _here(self, mask: Any) -> Any:
        return mask.to(self.device) if isinstance(mask, torch.Tensor) else mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            mask, options = args[0], dict(kwargs or {})
            device, dtype = options.get("device") or mask.device, options.get("dtype") or mask.dtype
            if device != mask.device and dtype is mask.dtype:
                return cls(mask.source, tuple(mask.shape), dtype, device)
        return super().__torch_dispatch__(func, types, args, kwargs)


def paged_mask(prior: str, **kwargs: Any) -> Any:
    """A mask for attention `"paged_cache"` on a model whose attention was `prior`."""
    make: Any = AttentionMaskInterface._global_mapping[prior]
    pattern = mask_pattern(kwargs["mask_function"])
    if pattern is None:
        return make(**kwargs)
    dtype = torch.bool if prior == "sdpa" else kwargs.get("dtype", torch.float32)
    shape = (kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"])
    return LazyMask(MaskSource(pattern, make, kwargs), shape, dtype, torch.device(kwargs.get("device", "cpu")))
