"""A model with some layers on disk: accelerate brings them for each forward, so that one forward for many rows pays.

Run it as `python examples/offloaded_model.py [MODEL]`: a folder or an id on the hub; without one, the model in the package.
"""

import sys
import tempfile
from typing import Any

import accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.assets import MODEL_PATH

name = sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH
tokenizer = AutoTokenizer.from_pretrained(name)
model: Any = AutoModelForCausalLM.from_pretrained(name)
prompts = [f"def {verb}_{noun}(" for verb in ("get", "set", "find", "load") for noun in ("item", "name")]
inputs = [tokenizer(prompt).input_ids for prompt in prompts]
options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
num_forwards = 0


def count(*args: Any) -> None:
    """Every forward of the model brings the weights of its last layer from disk."""
    global num_forwards
    num_forwards += 1


def one_by_one() -> list[list[int]]:
    """The new tokens of each prompt."""
    rows = [tokenizer(prompt, return_tensors="pt", return_token_type_ids=False) for prompt in prompts]
    outputs = [model.generate(**row, **options)[0, row["input_ids"].shape[1] :] for row in rows]
    return [output.tolist() for output in outputs]


expected = one_by_one()
with tempfile.TemporaryDirectory() as folder:
    layers = [name for name, module in model.named_modules() if hasattr(module, "self_attn")]
    others = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(others, "cpu") | {layer: "disk" if i % 2 else "cpu" for i, layer in enumerate(layers)}
    accelerate.dispatch_model(model, places, offload_dir=folder)
    model.get_submodule(layers[-1]).register_forward_pre_hook(count)

    one_by_one()
    print(f"one by one: {num_forwards} times from disk")
    num_forwards = 0
    pool = BlockPool.for_model(model, memory="8MiB")  # where the layers compute, not where their weights are
    with ContinuousBatcher(model, pool, tokenizer=tokenizer) as batcher:
        num_forwards = 0
        outputs = batcher.generate(inputs, **options)

print(f"side by side: {num_forwards} times from disk")
print("same tokens as without accelerate:", [output.generated_tokens for output in outputs] == expected)
print(pool)
