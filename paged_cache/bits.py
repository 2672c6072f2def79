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
    """By dtype and device a sum over all bits of all tensors, modulo 2**64, as if they were one. All have data."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.device].append(tensor.detach().reshape(-1))
    return tuple(int(_sum(torch.cat(group) if len(group) > 1 else group[0])) for group in groups.values())


def samples(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """The same over some elements of each tensor; those without data are left out."""
    return sums([_sample(tensor.detach()) for tensor in tensors if not tensor.is_meta])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.numel()
    if count > _SAMPLES and tensor.is_contiguous():
        return tensor.as_strided((_SAMPLES,), (count // _SAMPLES,), tensor.storage_offset())
    return tensor.reshape(-1)[:: max(count // _SAMPLES, 1)]


def _sum(flat: torch.Tensor) -> torch.Tensor:
    """Each word counts with an odd weight of its own, so that any one change shows."""
    words = flat.contiguous().view(torch.uint8)
    words = words.view(torch.int32) if words.numel() % 4 == 0 and words.storage_offset() % 4 == 0 else words
    odds, total = _odds(flat.device), torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in words.split(_CHUNK):
        total = total * _MIXER + (chunk.to(torch.int64) * odds[: chunk.numel()]).sum()
    return total


@lru_cache(maxsize=8)
def _odds(device: torch.device) -> torch.Tensor:
    """Without a pattern, so that no two changes cancel each other but by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator).to(device) * 2 + 1
