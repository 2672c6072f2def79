"""What the code of each page takes as given: models, prompts, folders, but no imports. Blocks of a page run in order, in one namespace."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, PagedCache
from paged_cache.assets import MODEL_PATH

Names = dict[str, Any]

# What pages say for the reader's machine, and what it is here.
INSTEAD = [
    (r'"\d+GiB"', '"64MiB"'),
    (r'model="\.\.\."', f"model={str(MODEL_PATH)!r}"),
    (r"max_new_tokens=200\b", "max_new_tokens=20"),
    (r"500\b", "50"),
]


def new_model() -> Any:
    """The model that the package ships, for blocks that change theirs."""
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()


@functools.cache
def shared_model() -> Any:
    """The same for all others; each page leaves it unpatched."""
    return new_model()


@functools.cache
def tokenizer() -> Any:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def usual(number: int) -> Names:
    """Before the first block of any page: a model, its tokenizer, prompts, a pool."""
    if number:
        return {}
    model, texts = shared_model(), ["def add(a, b):", "import os", "class Point:"]
    return {
        "dataset_or_generator": iter(texts),
        "inputs": tokenizer()(texts[:1], return_tensors="pt"),
        "model": model,
        "name": str(MODEL_PATH),
        "pool": BlockPool.for_model(model, num_blocks=200),
        "prompt": texts[0],
        "prompts": texts,
        "tokenizer": tokenizer(),
    }


def make_adapter(folder: str) -> None:
    """A folder with a LoRA adapter of the package's model."""
    get_peft_model(new_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).save_pretrained(
        folder
    )


def adapters_on_offloaded(number: int) -> Names:
    """The second block needs an adapter, and a model of which a part is on the disk."""
    if number != 1:
        return usual(number)
    make_adapter("adapter")
    layers = [f"model.layers.{i}" for i in range(shared_model().config.num_hidden_layers)]
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *layers]
    places = {part: "disk" if part == layers[0] else "cpu" for part in parts}
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, device_map=places, offload_folder="offloaded")
    return {"model": model, "folder": "adapter"}


def batcher(number: int) -> Names:
    """The second block submits to a batcher that is open."""
    if number != 1:
        return usual(number)
    pool = BlockPool.for_model(shared_model(), num_blocks=200)
    return {"batcher": ContinuousBatcher(shared_model(), pool), "prompt": [5, 6, 7]}


def adapters(number: int) -> Names:
    """Two folders of adapters; the second block loads them into a plain model, and a third one beside them."""
    if number == 0:
        for name in ("sql", "chat"):
            make_adapter(f"adapters/{name}")
        return usual(0) | {"base": new_model()}
    if number == 1:
        make_adapter("adapters/legal-v2")
        model = new_model()
        return {"model": model, "pool": BlockPool.for_model(model, num_blocks=200), "prompt": [5, 6, 7]}
    return {}


def pipelines(number: int) -> Names:
    """The last block needs the pipeline of the first one."""
    names = usual(number)
    return names | ({"pipe": pipeline("text-generation", model=str(MODEL_PATH))} if number == 2 else {})


def prefixes(number: int) -> Names:
    """A pool that knows a prompt."""
    names = usual(number)
    ids = torch.arange(1, 101).unsqueeze(0)
    with paged_cache.patch(names["model"]), PagedCache(names["pool"]) as cache:
        names["model"].generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return names


# By page; `usual` for all others. Each is called before every block of its page, with the block's number.
PRELUDES: dict[str, Callable[[int], Names]] = {
    "docs/accelerate.md": adapters_on_offloaded,
    "docs/batching.md": batcher,
    "docs/lora.md": adapters,
    "docs/pipelines.md": pipelines,
    "docs/prefix_files.md": prefixes,
}
