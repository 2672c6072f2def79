"""Runs the Triton kernels under the interpreter with unmapped memory right beside every tensor.

The interpreter's loads and stores are raw pointers, so an access outside a tensor ends the process with SIGSEGV. Usage:
`TRITON_INTERPRET=1 python guard_pages.py JOB...`, each a `front` or `back`; `,wrong-block` after it plants the mistake that
must be found.
"""

import ctypes
import mmap
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from paged_cache.kernels import reference
from paged_cache.kernels.triton import attention, plan
from tests.kernels.cases import Case, Inputs, build

GUARD = 1 << 20  # bytes on either side: more than a block, so that block -1 lies in it
FEATURES = {"window": 24, "softcap": 2.0, "sinks": True}
LENS = (0, 1, 37, 130)  # the longest last: beyond its last table entry lies the guard
CASES = [
    Case(lens=LENS, spare_blocks=0, head_dim=80, group=3, num_splits=3),
    Case(lens=LENS, head_dim=80, v_head_dim=48, q_len=5, block_size=4, num_splits=1, **FEATURES),
    Case(lens=LENS, spare_blocks=0, layout="HND", dtype=torch.float16, num_splits=2, chunk=20),
    Case(lens=LENS, spare_blocks=0, q_lens=(0, 1, 20, 7), dtype=torch.float16, num_splits=2, starts=(0, 0, 5, 70)),
    Case(lens=LENS, spare_blocks=0, q_len=3, bias=4, alibi=True, block_size=64, num_splits=2, window=24),
    Case(lens=LENS, spare_blocks=0, kv_dtype=torch.int8, head_dim=48, num_splits=3),
    Case(
        lens=LENS,
        spare_blocks=0,
        kv_dtype=torch.float8_e4m3fn,
        dtype=torch.float16,
        layout="packed",
        q_len=5,
        num_splits=2,
    ),
]
LIBC = ctypes.CDLL(None, use_errno=True)
KEPT = []  # memory that tensors lie in


def guarded(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """A copy with the same strides that begins (ends) where unmapped memory ends (begins)."""
    if tensor.numel() == 0:
        return tensor
    storage = tensor.untyped_storage()
    size = -(-storage.nbytes() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * GUARD)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + GUARD + size):
        if LIBC.mprotect(ctypes.c_void_p(guard), GUARD, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    first = start + GUARD + (0 if side == "front" else size - storage.nbytes())
    buffer = (ctypes.c_char * storage.nbytes()).from_address(first)
    KEPT.extend((memory, buffer))
    flat = torch.frombuffer(buffer, dtype=tensor.dtype)
    copy = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copy.copy_(tensor)


def guard_all(inputs: Inputs, side: str) -> Inputs:
    """`inputs` with every tensor guarded, and unused table entries that point into a guard."""
    outside = -1 if side == "front" else inputs.key_cache.shape[0]
    table = inputs.block_table.masked_fill(inputs.block_table < 0, outside)
    names = ("query", "key_cache", "value_cache", "seq_lens")
    tensors = {name: getattr(inputs, name) for name in names} | {"block_table": table}
    guards = {name: guarded(x, side) for name, x in tensors.items()}
    return replace(inputs, **guards, extras={name: guarded(x, side) for name, x in inputs.extras.items()})


def run_jobs(work: Callable[..., None], jobs: list[str]) -> None:
    """`work(*words)` for each job, its words joined by commas, in a forked child: it may die, and need not import."""
    for job in jobs:
        child = multiprocessing.get_context("fork").Process(target=work, args=job.split(","))
        child.start()
        child.join()
        print(f"== {job}: {child.exitcode}", flush=True)  # noqa: T201


def main(side: str, *mistakes: str) -> None:
    """Run all cases; ends in SIGSEGV if anything outside a tensor is touched."""
    new_empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda *args, **kwargs: guarded(new_empty(*args, **kwargs), side)
    for case in CASES:
        inputs = build(case)
        expected = inputs.double().run(reference.paged_attention)
        inputs = guard_all(inputs, side)
        if mistakes:
            inputs.block_table[-1, 0] = -1 if side == "front" else inputs.key_cache.shape[0]
        plan.Shape._budget = lambda shape, batch, num_tiles, splits=case.num_splits: (num_tiles * splits, 130 // splits)
        out = inputs.run(attention.paged_attention)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
        print("right", case)  # noqa: T201


if __name__ == "__main__":
    run_jobs(main, sys.argv[1:])
