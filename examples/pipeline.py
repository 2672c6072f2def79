"""transformers' text-generation pipeline, batched without padding: the same calls, the same outputs.

Run it as `python examples/pipeline.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import itertools
import sys
import time
from typing import Any

from transformers import pipeline

from paged_cache import BlockPool, PagedCache
from paged_cache.assets import MODEL_PATH
from paged_cache.integrations import paged_pipeline

pipe: Any = pipeline("text-generation", model=str(sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH))
options: Any = {"do_sample": False, "max_new_tokens": 32, "return_full_text": False}
names = ["mean", "add", "read_lines", "is_prime", "push", "load", "parse", "main"]
prompts = [f"def {name}(" for name in names] + ["class Stack:\n    def __init__(self", "import os\nimport "]

# As it is: a cache on a pool for one call.
print(
    "one cache:",
    pipe(prompts[0], past_key_values=PagedCache(BlockPool.for_model(pipe.model, num_blocks=64)), **options),
)

started = time.perf_counter()
expected = [pipe(prompt, **options) for prompt in prompts]
alone = time.perf_counter() - started

with paged_pipeline(pipe, memory="64MiB") as paged:
    started = time.perf_counter()
    outputs = paged(prompts, **options)
    print(f"{len(prompts)} prompts: {alone:.2f} s one by one, {time.perf_counter() - started:.2f} s paged")
    print("the same outputs:", outputs == expected)  # in 16 bits a near tie may tip

    # A stream: inputs are read while outputs are taken, here from one that never ends.
    endless = (f"def function_{number}(" for number in itertools.count())
    with paged(endless, **options) as stream:
        for output in itertools.islice(stream, 3):
            print("stream:", output[0]["generated_text"].splitlines()[0])

    # Each input its own length and random numbers; several answers to each.
    sampling: Any = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2}
    for records in paged(prompts[:2], max_new_tokens=[8, 16], seed=[1, 2], **sampling):
        print("sampled:", [record["generated_text"] for record in records])
    print(paged.batcher.stats())
