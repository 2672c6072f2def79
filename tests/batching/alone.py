"""What `generate` gives for one request alone, and batchers that are looked at after each step."""

import functools

import torch

from paged_cache import ContinuousBatcher
from tests.architectures.tiny import build
from tests.models import assert_whole, poisoned_pool

PAD = 1  # not 0, in whose place a beam search pads with the end-of-sequence token
MOST_STEPS = 20_000
OURS = {"request_id", "priority", "timeout", "seed", "cache_salt", "tenant", "expected_tokens"}
"""Options of `submit` that `generate` does not know."""


@functools.cache
def tiny(name):
    """The tiny random model of one architecture, in evaluation mode, fp32."""
    of = build(name)[0]
    of.generation_config.pad_token_id = PAD
    if name == "gemma2":
        of.set_attn_implementation("eager")  # sdpa leaves out the softcap
    return of


def prompt(length, seed=0):
    """Random token ids clear of the special ones."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(10, 80, (length,), generator=generator).tolist()


def run_alone(of, ids, seed=None, **options):
    """What `generate` returns for this prompt, un-batched and un-padded, with transformers' own cache."""
    options = {name: value for name, value in options.items() if name not in OURS}
    if seed is not None:
        torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=of.device)
    return of.generate(inputs, attention_mask=torch.ones_like(inputs), **options)


def alone(of, ids, **options):
    """The generated rows, shorter ones with padding behind them."""
    output = run_alone(of, ids, **options)
    return getattr(output, "sequences", output)[:, len(ids) :].tolist()


def padded(rows):
    """Rows of one length, as `generate` returns them."""
    width = max(map(len, rows))
    return [row + [PAD] * (width - len(row)) for row in rows]


def finish(batcher, handles=()):
    """Steps until all requests are over, and looks at the pool after each step; their outputs."""
    for _ in range(MOST_STEPS):
        has_work = batcher.step()
        batcher.pool.check()
        if not has_work:
            return [handle.result(timeout=0) for handle in handles]
    raise AssertionError(f"requests are left after {MOST_STEPS} steps: {batcher.stats()}")


def serve(of, requests, num_blocks=600, block_size=4, prefix_caching=True, **settings):
    """Submits `(prompt, options)` pairs to a batcher on a poisoned pool, which is whole in the end.

    Returns:
        Outputs, and the batcher's statistics.
    """
    pool = poisoned_pool(of, num_blocks, block_size, prefix_caching=prefix_caching)
    with ContinuousBatcher(of, pool, **settings) as batcher:
        handles = [batcher.submit(ids, **options) for ids, options in requests]
        outputs = finish(batcher, handles)
        stats = batcher.stats()
    del batcher, handles
    assert_whole(pool)
    return outputs, stats


def differences(outputs, expected):
    """By place: what came instead of the expected rows."""
    return {
        i: (output.error or output.sequences, want)
        for i, (output, want) in enumerate(zip(outputs, expected, strict=True))
        if output.error is not None or padded(output.sequences) != want
    }
