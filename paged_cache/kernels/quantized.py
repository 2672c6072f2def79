"""K and V of 8 bits with one scale per token and head."""

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtypes that a cache may hold besides floating point ones of 16 bits and more, and the largest magnitude of each."""


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantisation over the last dimension.

    Args:
        x: `[..., dim]`, any floating point dtype.
        dtype: One of `LARGEST`.

    Returns:
        Codes `[..., dim]` of `dtype` and float32 scales `[...]` with `codes * scale` next to `x`, rounded to nearest even. The
        largest magnitude of a vector is met exactly by int8's 127 or e4m3's 448; a vector of zeros has scale 0.
    """
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = largest / LARGEST[dtype]
    codes = x / scale.where(scale > 0, 1.0)[..., None]
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The inverse: `codes` `[..., dim]` times `scale` `[...]`, in `dtype`."""
    return codes.to(dtype) * scale.to(dtype)[..., None]


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """The same memory, e4m3 as uint8: torch cannot index float8, and not every GPU knows it."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
