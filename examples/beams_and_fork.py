"""Sequences with a common start keep it once: beams, `fork`, and `copy.deepcopy`, transformers' way to reuse a prompt.

Run it as `python examples/beams_and_fork.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import copy
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
prompt = tokenizer(inspect.getsource(textwrap)[:1500], return_tensors="pt").input_ids


def show(title: str, *caches: PagedCache) -> None:
    """Compares the blocks that all rows hold together with those that separate copies would take."""
    blocks = [block for cache in caches for row in cache.block_tables for table in row for block in table if block >= 0]
    print(f"{title}: {len(set(blocks))} blocks, separate copies would take {len(blocks)}")


with PagedCache(pool) as cache:
    model.generate(prompt, past_key_values=cache, num_beams=8, max_new_tokens=20, do_sample=False)
    show(f"8 beams over {prompt.shape[1]} tokens", cache)

# Compute a prompt once, then continue it in several ways. A copy costs no block until it is written.
start = PagedCache(pool)
with torch.no_grad():
    model(input_ids=prompt, past_key_values=start)
forks = start.fork(3)
show("a prompt and 3 forks", start, *forks)

for fork, ending in zip(forks, ["def first", "def second", "class Third"], strict=True):
    ids = torch.cat([prompt, tokenizer(ending, add_special_tokens=False, return_tensors="pt").input_ids], dim=1)
    output = model.generate(ids, past_key_values=fork, max_new_tokens=12, do_sample=False)
    print(repr(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)))
show("after they went on", start, *forks)

again = copy.deepcopy(start)  # the same as start.fork()
show("a prompt and its deepcopy", start, again)
print(f"blocks copied because they were written while shared: {pool.stats().cow_copies}")
