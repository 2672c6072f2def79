"""Sums over the bits of tensors: equal content gives equal sums, and a change shows."""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

import torch

_SAMPLES = 64
"""Elements of a tensor that `samples` looks at."""

_ROW = 2**14
"""Words of 32 bits that make one sum."""

_ROWS = {"cpu": 16, "cuda": 512}
"""Rows summed at once: what stays in a cache on a CPU, what keeps a GPU busy."""


def sums(tensors: list[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """By dtype and device sums over all bits of all tensors, as if they were one. All have data."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        for part in plain(tensor):
            groups[part.dtype, part.device].append(part.detach().reshape(-1))
    joined = (torch.cat(group) if len(group) > 1 else group[0] for group in groups.values())
    return tuple(tuple(row_sums(flat.contiguous().view(torch.uint8)).tolist()) for flat in joined)


def samples(tensors: list[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """The same over some elements of each tensor; those without data are left out."""
    parts = (part for tensor in tensors for part in plain(tensor))
    return sums([_sample(part.detach()) for part in parts if not part.is_meta])


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a wrapper, such as a quantised weight, is made of; or the tensor itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    else:
        yield tensor


def row_sums(flat: torch.Tensor) -> torch.Tensor:
    """int64, one per started row of bytes: the words, each times an odd number of its own, modulo 2**64."""
    if flat.storage_offset() % 4:
        flat = flat.clone()
    weights, step = _multipliers(flat.device), _ROWS.get(flat.device.type, 16)
    whole = flat.numel() // (4 * _ROW)
    rows = flat[: whole * 4 * _ROW].view(torch.int32).view(whole, _ROW)
    rest = flat.new_zeros(4 * _ROW)
    rest[: flat.numel() - rows.numel() * 4] = flat[rows.numel() * 4 :]
    parts = [(rows[start : start + step] * weights).sum(-1) for start in range(0, whole, step)]
    return torch.cat([*parts, (rest.view(torch.int32) * weights).sum(-1, keepdim=True)])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.numel()
    if count > _SAMPLES and tensor.is_contiguous():
        return tensor.as_strided((_SAMPLES,), (count // _SAMPLES,), tensor.storage_offset())
    return tensor.reshape(-1)[:: max(count // _SAMPLES, 1)]


@lru_cache(maxsize=8)
def _multipliers(device: torch.device) -> torch.Tensor:
    """Odd numbers of 64 bits without a pattern, so that no two words can make up for each other."""
    with torch.inference_mode(False):
        mixed = (torch.arange(1, _ROW + 1, device=device) * -7046029254386353131) ^ 0x5851F42D4C957F2D
        mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
        return (mixed ^ (mixed >> 32)) | 1
