"""Pools and new tokens for what writes into blocks: the inputs of the tests of all writers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from paged_cache.kernels import reference

UNTOUCHED = 7.0
NUM_BLOCKS = 7
VIEWS = {  # shape in memory of [blocks, slots, heads, dim], and how to get from it to that
    "NHD": (lambda n, s, h, d: (n, s, h, d), lambda x: x),
    "HND": (lambda n, s, h, d: (n, h, s, d), lambda x: x.transpose(1, 2)),
    "packed": (lambda n, s, h, d: (n, 2, h, s, d), lambda x: x[:, 1].transpose(1, 2)),
    "head_major": (lambda n, s, h, d: (h, n, s, d), lambda x: x.permute(1, 2, 0, 3)),
    "odd": (lambda n, s, h, d: (n, s, h, d + 1), lambda x: x[..., 1:]),
}


@dataclass(frozen=True)
class Pool:
    """What a write fills: caches and scales."""

    tensors: tuple[torch.Tensor, ...]

    def write(self, kernel: Callable[..., None], keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """By the kernel under test, or by the reference."""
        names = ("key_scales", "value_scales")
        kernel(keys, values, *self.tensors[:2], slots, **dict(zip(names, self.tensors[2:], strict=False)))


def pool(
    kv_dtype: torch.dtype,
    layout: str,
    block_size: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    device: str = "cpu",
) -> Pool:
    """A pool that holds `UNTOUCHED` everywhere."""
    shape, view = VIEWS[layout]
    tensors = [
        view(torch.full(shape(NUM_BLOCKS, block_size, h, d), UNTOUCHED, device=device).to(kv_dtype))
        for h, d in zip(heads, dims, strict=True)
    ]
    if kv_dtype.itemsize == 1:
        tensors += [torch.full((NUM_BLOCKS, h, block_size), UNTOUCHED, device=device).transpose(1, 2) for h in heads]
    return Pool(tuple(tensors))


def bits(x: torch.Tensor) -> torch.Tensor:
    """What is compared: NaN included."""
    return x.flatten().contiguous().view(torch.uint8)


def assert_same(ours: Pool, expected: Pool) -> None:
    """Every bit of both pools."""
    for mine, theirs in zip(ours.tensors, expected.tensors, strict=True):
        assert torch.equal(bits(mine), bits(theirs))


SHAPES = [  # layout, block size, heads and dimensions of keys and values
    ("NHD", 16, (2, 2), (64, 64)),
    ("HND", 16, (2, 2), (80, 48)),
    ("packed", 4, (1, 1), (16, 24)),
    ("head_major", 12, (3, 3), (33, 33)),
    ("odd", 8, (2, 2), (20, 20)),
    ("HND", 8, (3, 1), (5, 0)),
]
KV_DTYPES = [torch.float32, torch.int8, torch.float8_e4m3fn]
NEW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(
    kernel: Callable[..., None],
    shape: tuple[str, int, tuple[int, int], tuple[int, int]],
    kv_dtype: torch.dtype,
    new_dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """The kernel leaves the same bits as the reference: codes and scales, and `UNTOUCHED` where nothing was written."""
    _, block_size, heads, dims = shape
    num_tokens = 20
    keys, values = (
        (torch.randn(num_tokens, d, h, device=device) * 3).to(new_dtype).transpose(1, 2)
        for h, d in zip(heads, dims, strict=True)
    )
    keys[3] = 0
    keys[4, 0, 2] = float("nan")
    keys[5] *= 1e-3
    keys[6, 0, 1] = -448
    slots = torch.randperm(NUM_BLOCKS * block_size, device=device)[:num_tokens]
    slots[[2, 9]] = -1
    ours, expected, before = (pool(kv_dtype, *shape, device) for _ in range(3))
    ours.write(kernel, keys, values, slots)
    expected.write(reference.write_kv, keys, values, slots)
    assert_same(ours, expected)
    assert not torch.equal(bits(ours.tensors[0]), bits(before.tensors[0]))
