"""Sums over the bits of tensors: equal content gives equal sums, and a change shows."""

from collections import defaultdict
from functools import lru_cache

import torch

_SAMPLES = 64
"""Elements of a tensor that `samples` looks at."""

_CHUNK = 2**18
"""Words that are summed up at once."""

_MIXER = 0x1E3779B97F4A7C15
"""An odd number without a pattern."""


def sums(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """Of each tensor a sum over all of its bits, modulo 2**64."""
    found = [_sum(tensor.detach()) for tensor in tensors]
    if len({x.device for x in found}) > 1:
        found = [x.cpu() for x in found]
    return tuple(torch.stack(found).tolist()) if found else ()


def samples(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """By dtype and device a sum over the bits of some elements of each tensor. Tensors without data are left out."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not tensor.is_meta:
            groups[tensor.dtype, tensor.device].append(_sample(tensor.detach()))
    return sums([torch.cat(group) for group in groups.values()])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.numel()
    if count > _SAMPLES and tensor.is_contiguous():
        return tensor.as_strided((_SAMPLES,), (count // _SAMPLES,))
    return tensor.reshape(-1)[:: max(count // _SAMPLES, 1)]


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Each word counts with an odd weight of its own, so that any one change shows."""
    flat = tensor.reshape(-1).contiguous().view(torch.uint8)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    odds, total = _odds(tensor.device), torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in words.split(_CHUNK):
        total = total * _MIXER + (chunk.to(torch.int64) * odds[: chunk.numel()]).sum()
    return total


@lru_cache(maxsize=8)
def _odds(device: torch.device) -> torch.Tensor:
    """Without a pattern, so that no two changes cancel each other but by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator).to(device) * 2 + 1
