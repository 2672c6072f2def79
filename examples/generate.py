"""A paged cache under an unchanged `model.generate`: three lines, the same tokens.

Run it as `python examples/generate.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import paged_cache
from paged_cache import BlockPool, PagedCache
from paged_cache.assets import MODEL_PATH

name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model: Any = AutoModelForCausalLM.from_pretrained(name)
prompts = ["async def main():\n", "class Queue:\n    def __len__(self):\n        return len(self._items)\n\n    def "]
inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

expected = model.generate(**inputs, **options)

# The three lines: a pool for the model, attention that reads its blocks in place, a cache on it.
pool = BlockPool.for_model(model, num_blocks=64)
paged_cache.patch(model)
output = model.generate(**inputs, **options, past_key_values=PagedCache(pool))

for text in tokenizer.batch_decode(output, skip_special_tokens=True):
    print(text, end="\n\n")
print(pool)
print("same tokens as without it:", bool((output == expected).all()))
