"""What a batcher does, seen from outside: metrics for Prometheus, a log line, a trace of each request, a map of the pool.

Run it as `python examples/observability.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import logging
import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.assets import MODEL_PATH
from paged_cache.observability import ChromeTrace, Finished, Generated, PrometheusMetrics, save_pool_map

logging.basicConfig(format="%(levelname)s %(message)s")
logging.getLogger("paged_cache").setLevel(logging.INFO)

name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(name)
model: Any = AutoModelForCausalLM.from_pretrained(name)
pool = BlockPool.for_model(model, num_blocks=64)

prompts = ["def add(a, b):\n", "class Stack:\n    def push(self, item):\n", "import os\n", "for i in range(10):\n"]

with ContinuousBatcher(model, pool, tokenizer=tokenizer, log_stats=0.2) as batcher:
    trace = batcher.observe(ChromeTrace())

    def on_event(event: object) -> None:
        """Called with whatever happens, between two steps."""
        if isinstance(event, Generated) and event.request_id == "stack" and event.is_first:
            print(f"the map, while requests run: {save_pool_map(batcher, 'out/pool.html')}")
        elif isinstance(event, Finished):
            print(f"{event.request_id} ended ({event.finish_reason}) after {event.num_generated_tokens} tokens")

    batcher.observe(on_event)
    batcher.submit(prompts[1], request_id="stack", max_new_tokens=32, do_sample=False)
    batcher.generate(prompts, max_new_tokens=[8, 64, 16, 24], do_sample=False)

    print(f"one request: {[type(event).__name__ for event in trace.for_request('stack')][:5]} ...")
    print(f"for chrome://tracing or https://ui.perfetto.dev: {trace.save('out/trace.json')}")

    try:
        from prometheus_client import generate_latest
    except ModuleNotFoundError:
        print("for metrics: pip install prometheus_client")
    else:  # a server would call prometheus_client.start_http_server(9090) once instead
        PrometheusMetrics(batcher, model_name="example")
        batcher.generate(prompts, max_new_tokens=16, do_sample=False)
        lines = generate_latest().decode().splitlines()
        print(*(line for line in lines if "hits_total{" in line or "generation_tokens_total{" in line), sep="\n")
