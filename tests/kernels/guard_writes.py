"""Runs what writes into blocks with unmapped memory right beside every tensor; see `guard_pages.py`.

Usage: `TRITON_INTERPRET=1 python guard_writes.py JOB...`, each a `triton` or `cpu`, `,front` or `,back`. A third word plants
the mistake that must be found: `,wrong-slot` is one behind the pool, `,wrong-block` copies one that lies outside.
"""

import importlib
import sys

import torch

from paged_cache.kernels import reference
from tests.kernels.guard_pages import guarded, run_jobs
from tests.kernels.write_cases import KV_DTYPES, NUM_BLOCKS, SHAPES, Pool, assert_same, pool

WRITERS = {"triton": "paged_cache.kernels.triton.cache", "cpu": "paged_cache.kernels.cpu.cache"}
NUM_TOKENS = 21  # the last program has tokens to leave out


def main(writer: str, side: str, mistake: str = "") -> None:
    """Run all cases; ends in SIGSEGV if anything outside a tensor is touched."""
    kernel = importlib.import_module(WRITERS[writer])
    for shape in SHAPES:
        _, block_size, heads, dims = shape
        for kv_dtype in KV_DTYPES[1:]:
            keys, values = (guarded(torch.randn(NUM_TOKENS, h, d), side) for h, d in zip(heads, dims, strict=True))
            slots = torch.randperm(NUM_BLOCKS * block_size)[:NUM_TOKENS]
            slots[0] = -1
            expected = pool(kv_dtype, *shape)
            ours = Pool(tuple(guarded(x, side) for x in pool(kv_dtype, *shape).tensors))
            expected.write(reference.write_kv, keys, values, slots)
            if mistake == "wrong-slot":
                slots[1] = NUM_BLOCKS * block_size
                kernel._check_slots = lambda *_: None  # it would be refused
            ours.write(kernel.write_kv, keys, values, guarded(slots, side))
            assert_same(ours, expected)
            print("right", shape, kv_dtype)  # noqa: T201
    for numel in (3, 64, 5000):
        slabs = [guarded(torch.randn(4, numel), side) for _ in range(2)]
        pairs = torch.tensor([[0, 3], [2, 1]])
        if mistake == "wrong-block":
            pairs[1, 0] = -1 if side == "front" else 4
        kernel.copy_blocks(slabs, slabs, guarded(pairs, side))
        print("right", torch.equal(slabs[1][3], slabs[1][0]))  # noqa: T201


if __name__ == "__main__":
    run_jobs(main, sys.argv[1:])
