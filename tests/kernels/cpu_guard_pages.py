"""Runs the compiled CPU kernel with unmapped memory right beside every tensor: a touch outside ends in SIGSEGV.

Usage: `python cpu_guard_pages.py front|back [wrong-block]`; the last word plants the mistake that must be found.
"""

import sys
from functools import partial

import torch

from paged_cache.kernels import cpu, reference
from tests.kernels.cases import Case, build
from tests.kernels.guard_pages import guard_all, guarded

LENS = (0, 1, 37, 130)  # the longest last: beyond its last table entry lies the guard
CASES = [
    Case(lens=LENS, spare_blocks=0, head_dim=80, group=3),
    Case(lens=LENS, head_dim=72, v_head_dim=40, q_len=5, block_size=4, window=24, softcap=2.0, sinks=True, alibi=True),
    Case(lens=LENS, spare_blocks=0, layout="HND", q_len=40, dtype=torch.bfloat16, chunk=20, starts=(0, 0, 3, 100)),
    Case(lens=LENS, spare_blocks=0, q_len=3, bias=4, head_dim=8),
    Case(lens=LENS, spare_blocks=0, q_lens=(0, 1, 7, 50), kv_dtype=torch.int8, head_dim=24),
    Case(lens=LENS, spare_blocks=0, kv_dtype=torch.float8_e4m3fn, layout="odd", dtype=torch.float16, head_dim=24),
]


def main(side: str, *mistakes: str) -> None:
    """Run all cases; ends in SIGSEGV if anything outside a tensor is touched."""
    new_empty = torch.Tensor.new_empty
    for case in CASES:
        inputs = build(case)
        expected = inputs.double().run(reference.paged_attention)
        inputs = guard_all(inputs, side)
        if mistakes:
            inputs.block_table[-1, 0] = -1 if side == "front" else inputs.key_cache.shape[0]
        torch.Tensor.new_empty = lambda *args, **kwargs: guarded(new_empty(*args, **kwargs), side)
        out = inputs.run(partial(cpu.paged_attention, memo={}))  # without a memo, it would refuse such a table
        torch.Tensor.new_empty = new_empty
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
        print("right", case)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
