"""One system prompt, many questions: after the first call, its tokens do not enter the model again.

Run it as `python examples/shared_prefix.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import inspect
import sys
import textwrap
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
pool = BlockPool.for_model(model, num_blocks=128)

entered: list[int] = []  # tokens per forward
model.get_input_embeddings().register_forward_pre_hook(lambda _, args: entered.append(args[0].numel()))

system = tokenizer(inspect.getsource(textwrap)[:1500]).input_ids
questions = ["\n\ndef wrap(lines):\n", "\n\ndef indent(text):\n", "\n\nclass Paragraph:\n"]
prompts = [torch.tensor([system + tokenizer(text, add_special_tokens=False).input_ids]) for text in questions]


def ask(prompt: torch.Tensor, cache: PagedCache) -> None:
    """Generates a little, and shows how many tokens of the prompt were computed for it."""
    entered.clear()
    model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(f"prompt of {prompt.shape[1]} tokens: {entered[0]} entered the model")


# The cache finds what the pool holds by itself, also after the cache that computed it was released.
for prompt in prompts[:2]:
    with PagedCache(pool) as cache:
        ask(prompt, cache)

# Or look first: what is there already can be seen before anything is computed.
cache = PagedCache.for_prompt(pool, prompts[2])
print(f"for_prompt: {cache.get_seq_length()} tokens are there already")
ask(prompts[2], cache)

# Tenants share nothing: a salt keeps their prefixes apart.
ask(prompts[2], PagedCache(pool, cache_salt="another tenant"))

stats = pool.stats()
print(f"over all calls: {stats.prefix_hits} of {stats.prefix_queries} prompt tokens were in the pool")
