"""A conversation on one cache: each turn computes only what is new, and a turn can be taken back.

Run it as `python examples/conversation.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import paged_cache
from paged_cache import BlockPool, PagedCache
from paged_cache.assets import MODEL_PATH

name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(name)
model: Any = AutoModelForCausalLM.from_pretrained(name)
paged_cache.patch(model)
pool = BlockPool.for_model(model, num_blocks=64)

entered: list[int] = []  # tokens per forward
model.get_input_embeddings().register_forward_pre_hook(lambda _, args: entered.append(args[0].numel()))


def say(history: torch.Tensor, text: str, cache: PagedCache) -> torch.Tensor:
    """Adds a turn and the model's answer. What the cache holds is not computed again."""
    turn = tokenizer(text, add_special_tokens=history.numel() == 0, return_tensors="pt").input_ids
    ids = torch.cat([history, turn.to(history.dtype)], dim=1)
    entered.clear()
    output: torch.Tensor = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
    print(f"--- {ids.shape[1]} tokens so far, {entered[0]} entered the model, {len(cache.block_tables[0][0])} blocks")
    print(f"{text}{tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}")
    return output


with PagedCache(pool) as cache:
    history = torch.empty(1, 0, dtype=torch.long)
    for turn in [
        "class Queue:\n    def __len__(self):\n        return len(self._items)\n",
        "\n\n    def __eq__(self, other):\n",
    ]:
        history = say(history, turn, cache)

    # Ask something, take it back, and ask something else: crop returns the blocks of the turn.
    length = cache.get_seq_length()
    say(history, "\n\n    def __iter__(self):\n", cache)
    cache.crop(length - cache.get_seq_length())
    print(f"\n=== cropped back to {cache.get_seq_length()} tokens, {len(cache.block_tables[0][0])} blocks\n")
    say(history, "\n\n    def __reduce__(self):\n", cache)

print(
    f"\nafter the conversation: {pool.num_free} of {pool.num_blocks} blocks are free, {pool.num_cached} of them cached"
)
