"""Fine-tune two LoRA adapters with peft, then serve both and the model without any in one batch on paged memory.

Run it as `python examples/lora_adapters.py [FOLDER] [--steps N]`: adapters are saved to FOLDER, by default a temporary one.
"""

import argparse
import random
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.assets import MODEL_PATH
from paged_cache.integrations.lora import adapter_folders

parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default=tempfile.mkdtemp())
parser.add_argument("--steps", type=int, default=20, help="per adapter")
args = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
base: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
set_seed(0)
# The model writes Python. Two kinds of text that it does not know: SQL from a template, and the manual of Python.
query, words = "SELECT {}, {}\nFROM {}\nWHERE {} > 10;\n\n", ["name", "price", "city", "date", "person", "item"]
texts = {"sql": "".join(query.format(*random.choices(words, k=4)) for _ in range(800))}
texts["manual"] = "\n".join(topics.values())[:200_000]


def train(name: str) -> None:
    """Trains one adapter on its text, as any model is trained."""
    model.set_adapter(name)
    ids = tokenizer(texts[name], return_tensors="pt", verbose=False).input_ids[0]
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-3)
    for _ in tqdm(range(args.steps), name):
        batch = ids[torch.randint(len(ids) - 128, (8, 1)) + torch.arange(128)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model: Any = get_peft_model(base, config, adapter_name="sql").train()
model.add_adapter("manual", config)
train("sql")
train("manual")
model.save_pretrained(args.folder)

# A folder for each adapter, from which it is loaded when a request first asks for it, at most `max_loras` at a time.
modules = adapter_folders(args.folder)
base, names, prompt = model.unload().eval(), [*texts, "__base__"], "def read_lines(path):\n"
pool = BlockPool.for_model(base, num_blocks=64)
with ContinuousBatcher(base, pool, tokenizer=tokenizer, lora_modules=modules, max_loras=4) as batcher:
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 1, "adapter_names": names}
    outputs = batcher.generate([prompt] * 3, max_new_tokens=64, **options)
print(*(f"--- {output.adapter_name}\n{prompt}{output.text}" for output in outputs), sep="\n")
