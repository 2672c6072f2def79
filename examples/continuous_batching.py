"""Many requests at once: prompts and options of any kind, tokens as they come, one request taken back.

Run it as `python examples/continuous_batching.py [MODEL]`: a folder or an id on the hub; without one, the model in the
package.
"""

import sys
import threading
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.assets import MODEL_PATH

name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(name)
model: Any = AutoModelForCausalLM.from_pretrained(name)
pool = BlockPool.for_model(model, num_blocks=256)

with ContinuousBatcher(model, pool, tokenizer=tokenizer) as batcher:
    # A list: sequences join and leave the batch at every step, nobody waits for the longest answer.
    prompts = ["def add(a, b):\n", "class Stack:\n    def push(self, item):\n", "import os\n", "for i in range(10):\n"]
    outputs = batcher.generate(prompts, max_new_tokens=[8, 64, 16, 24], do_sample=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ttft, tokens = output.metrics.ttft or 0.0, len(output.generated_tokens)
        print(
            f"--- {prompt.splitlines()[0]!r}: {tokens} tokens, {output.finish_reason}, first after {ttft * 1e3:.0f} ms"
        )
        print(output.text)

    # One by one, from any thread, with the options of `generate`, each with its own.
    batcher.start()
    stream = batcher.submit(prompts[0], max_new_tokens=32, do_sample=True, temperature=0.7, seed=1)
    beams = batcher.submit(prompts[1], max_new_tokens=16, num_beams=4, num_return_sequences=2, do_sample=False)
    unwanted = batcher.submit(prompts[2], max_new_tokens=500, do_sample=False)
    threading.Timer(0.05, unwanted.cancel).start()
    print("--- a stream: ", end="")
    for token in stream:
        print(tokenizer.decode(token), end="", flush=True)
    print(f"\n--- two of four beams: {[text.strip()[:40] for text in beams.result(timeout=60).texts]}")
    print(f"--- taken back: {unwanted.result(timeout=60)!r:.60}...")
    stats = batcher.stats()

print(f"{stats.forward} steps: {stats.num_steps}, tokens: {stats.num_batched_tokens}, ended: {stats.finished}")
