"""The same batch without a KV cache and with three of them: first token, further tokens, memory, the same text.

Run it as `python examples/compare_kv_caches.py [MODEL]`: a folder or an id on the hub; without one, the model in the
package. `paged-cache compare` does it at length, with plots.
"""

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from paged_cache import BlockPool, PagedCache, patch
from paged_cache.assets import MODEL_PATH

NEW = 32
PROMPTS = ["import os\n", "def add(a, b):\n", "class Stack:\n    def push(self, item):\n" * 8, "for i in range(10):\n"]
times: list[float] = []

name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model: Any = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
options = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
patch(model)  # does nothing to other caches
pool = BlockPool.for_model(model, num_blocks=256, prefix_caching=False)  # else the second round has its prompts already
ways: dict[str, Any] = {
    "no cache": lambda: None,
    "DynamicCache": lambda: DynamicCache(config=model.config),
    "StaticCache": lambda: StaticCache(config=model.config, max_cache_len=256),
    "PagedCache": lambda: PagedCache(pool),
}


def note_time(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Called by `generate` whenever the scores of the next tokens are there."""
    times.append(time.perf_counter())
    return scores


def measure(cache: Any) -> tuple[torch.Tensor, str]:
    """The output, and a line with milliseconds until the first token and for each further one, and MiB."""
    times[:] = [time.perf_counter()]
    more = {"past_key_values": cache, "use_cache": cache is not None, "logits_processor": [note_time]}
    output = model.generate(**inputs, **options, **more)
    first, further = times[1] - times[0], (times[-1] - times[1]) / (NEW - 1)
    size = pool.stats().num_referenced * pool.nbytes // pool.num_blocks  # of the blocks in use
    if not isinstance(cache, PagedCache):
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if cache else 0
    return output, f"{first * 1e3:9.1f} ms{further * 1e3:9.2f} ms{size / 2**20:8.2f} MiB"


expected = model.generate(**inputs, **options)
print(f"{'':14}{'first token':>12}{'per token':>12}{'K and V':>12}")
for way, make_cache in [*ways.items(), *ways.items()]:  # the first round warms up
    output, line = measure(make_cache())
    print(f"{way:14}{line}  {'the same' if torch.equal(output, expected) else 'other'} tokens")
