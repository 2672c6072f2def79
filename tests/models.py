"""Small models that tests share: one per kind of attention, and prompts for them."""

import contextlib
import functools
import gc

import torch

import paged_cache
from paged_cache import BlockPool
from tests.architectures.tiny import build

KINDS = {
    "llama": "llama",
    "mistral": "mistral",  # sliding window in all layers
    "qwen2": "qwen2",  # sliding window in some layers
    "gemma2": "gemma2",  # softcap, sliding + full
    "gpt2": "gpt2",
    "gpt_oss": "gpt_oss",  # sinks
    "deepseek_v3": "deepseek_v3",  # MLA
    "qwen3_next": "qwen3_next",  # linear attention states beside full attention
    "llama4": "llama4_text",  # chunked attention
}


@functools.cache
def model(kind):
    """The tiny random model of one kind, in evaluation mode, fp32."""
    return build(KINDS[kind])[0]


def prompts(lengths=(5, 12, 33), seed=1):
    """Left-padded random prompts: `input_ids` and `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(input_ids, lengths, strict=True):
        row[-length:] = torch.randint(10, 80, (length,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def poisoned_pool(of, num_blocks=600, block_size=4, **kwargs):
    """A pool whose freed blocks are filled with NaN, so that a read of one shows in the tokens."""
    pool = BlockPool.for_model(of, num_blocks=num_blocks, block_size=block_size, **kwargs)
    pool.storage.fill_blocks(list(range(num_blocks)), float("nan"))
    pool.manager.on_free = lambda blocks: pool.storage.fill_blocks(blocks, float("nan")) if blocks else None
    return pool


def assert_whole(pool):
    """All blocks are back and the bookkeeping is sound."""
    gc.collect()
    pool.check()
    assert pool.num_free == pool.num_blocks


def maybe_patched(of, patched):
    """`patch(model)` or nothing."""
    return paged_cache.patch(of) if patched else contextlib.nullcontext()


class TokenCounter:
    """Counts the tokens that enter a model: `with TokenCounter(model) as counter: ...; counter.tokens`."""

    def __init__(self, of):
        self.tokens, self._embedding = 0, of.get_input_embeddings()

    def __enter__(self):
        self._hook = self._embedding.register_forward_pre_hook(self._count)
        return self

    def _count(self, module, args):
        self.tokens += args[0].numel()

    def __exit__(self, *error):
        self._hook.remove()
