"""Whole models on several devices, on a machine with only a CPU: `python tests/far_runs.py` runs all of them, prints JSON."""

import copy
import functools
import json
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accelerate
import pytest
import torch
from transformers import DynamicCache

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, PagedCache
from paged_cache.errors import InvalidRequestError, UnsupportedModelError
from paged_cache.kernels import dispatch
from tests import far_device  # noqa: F401 (registers the devices)
from tests.architectures.tiny import build
from tests.models import KINDS, assert_whole, model, poisoned_pool, prompts

GREEDY = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
PLACES = ["cpu", "far:0", "far:1"]


@functools.cache
def plain(kind):
    """The model on one device, with attention that any device can compute."""
    of = copy.deepcopy(model(kind) if kind in KINDS else build(kind)[0])
    of.set_attn_implementation("eager")
    return of


def spread(kind, places=PLACES, main="cpu"):
    """A copy with its layers on these devices in turns and the head on the last; inputs begin on `main`."""
    of = copy.deepcopy(plain(kind))
    stem = "transformer.h" if kind.startswith("gpt") else "model.layers"
    layers = dict(of.get_submodule(stem).named_children())
    places_of = {f"{stem}.{name}": places[int(name) % len(places)] for name in layers}
    others = ("lm_head", "norm", "ln_f", "embedding_norm")
    for name, module in of.named_modules():
        has_tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if has_tensors and not name.startswith(f"{stem}."):
            places_of[name] = places[-1] if name.rpartition(".")[2] in others else main
    return accelerate.dispatch_model(of, {name: str(x) for name, x in places_of.items()}, main_device=main)


def unpadded(lengths=(5, 12, 33)):
    """Prompts as lists."""
    inputs = prompts(lengths)
    return [x[mask.bool()].tolist() for x, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@functools.cache
def expected(kind, lengths=(5, 12, 33), **options):
    """What the model on one device generates for each prompt alone."""
    found = []
    for ids in unpadded(lengths):
        of, ids = plain(kind), torch.tensor([ids])
        cache = DynamicCache(config=of.config.get_text_config())
        output = of.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | options, past_key_values=cache)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def generate(of, pool, lengths=(5, 12, 33), **options):
    """New tokens of a padded batch."""
    inputs = prompts(lengths)
    output = of.generate(**inputs, **GREEDY | options, past_key_values=PagedCache(pool))
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def padded(kind):
    """A padded batch, twice: the plain tokens, kernels on all devices, and the second time from known prefixes."""
    of = spread(kind)
    pool, kernels = poisoned_pool(of), []

    def kernel(query, keys, values, table, seq_lens, **options):
        kernels.append({x.device for x in (query, keys, values, table, seq_lens)})
        return dispatch.paged_attention(query, keys, values, table, seq_lens, **options)

    with paged_cache.patch(of), mock.patch.object(paged_cache.attention, "paged_attention", kernel):
        for _ in range(2):
            assert generate(of, pool) == expected(kind)
    layers = sorted(pool.spec.layers)
    assert [str(pool.storage.device_of(i)) for i in layers] == [PLACES[i % 3] for i in layers]
    assert [str(pool.storage.layers[i].keys.device) for i in layers] == [PLACES[i % 3] for i in layers]
    assert all(len(devices) == 1 for devices in kernels)
    assert set.union(*kernels) == set(pool.devices) == {torch.device(x) for x in PLACES[: len(layers)]}
    assert pool.stats().prefix_hits > 0
    assert_whole(pool)


def without_patch():
    """Dense tensors are gathered where each layer is."""
    of = spread("llama")
    assert generate(of, poisoned_pool(of)) == expected("llama")


def without_numbers():
    """Layers that do not say which they are, with attention that is written out, are found by their place in a list."""
    of = spread("gpt_neo", ["cpu", "far:0"])
    pool = poisoned_pool(of)
    assert pool.devices == (torch.device("cpu"), torch.device("far:0"))
    with paged_cache.patch(of):
        assert generate(of, pool) == expected("gpt_neo")


def beams():
    """Beams fork and copy blocks on all devices."""
    of = spread("gemma2")
    with paged_cache.patch(of):
        assert generate(of, poisoned_pool(of), (13,), num_beams=3) == expected("gemma2", (13,), num_beams=3)


def batcher(kind, name, **where):
    """Each request gets its plain tokens, with processors, beams and sampling where the logits are."""
    of = spread(kind, **where)
    pool = poisoned_pool(of)
    options = [{}, {"repetition_penalty": 1.5}, {"num_beams": 2}]
    options += [{"do_sample": True, "top_k": 1}] if not where else []  # far devices have no random numbers
    with ContinuousBatcher(of, pool) as batcher:
        assert name in batcher._engine.forward.name, batcher._engine.forward.name
        for lengths in ((5,), (12,), (33,)):
            (ids,) = unpadded(lengths)
            handles = [batcher.submit(ids, **GREEDY | each) for each in options]
            found = [handle.result(timeout=60).generated_tokens for handle in handles]
            assert found == [expected(kind, lengths, **each)[0] for each in options]
    assert_whole(pool)


def eight_bits():
    """Codes and scales are where the layers are; tokens are those of a pool of 8 bits on one device."""
    of = spread("llama")
    found = []
    for each in (plain("llama"), of):
        with paged_cache.patch(each):
            found.append(generate(each, BlockPool.for_model(each, num_blocks=100, block_size=4, kv_dtype="int8")))
    assert found[0] == found[1]


def memory():
    """Bytes are those of all devices together."""
    of = spread("llama", ["cpu", "far:1"])
    pool = BlockPool.for_model(of, memory="1MiB", block_size=4)
    assert 0.99 * 2**20 < pool.nbytes <= 2**20
    assert {x.device: x.nbytes for x in pool.storage._slabs} == dict.fromkeys(pool.devices, pool.nbytes // 4)


def prefix_file():
    """Prefixes are written from all devices to one file, and read back to all of them."""
    of = spread("llama")
    first, second = poisoned_pool(of), poisoned_pool(of)
    with paged_cache.patch(of), tempfile.TemporaryDirectory() as folder:
        generate(of, first)
        first.save_prefixes(f"{folder}/prefixes.safetensors")
        assert second.load_prefixes(f"{folder}/prefixes.safetensors") > 0
        assert generate(of, second) == expected("llama")
    assert second.stats().prefix_hits > 0


def moved():
    """A layer that was moved after the pool was made is refused, with both devices named; no block is lost."""
    of, other = spread("llama", ["cpu", "far:0"]), spread("llama", ["cpu", "far:1"])
    pool = BlockPool.for_model(other, num_blocks=50, block_size=4)
    pool._model = None
    with pytest.raises(InvalidRequestError, match=r"layer 1 gives keys on far:0, .* on far:1"):
        generate(of, pool)
    assert_whole(pool)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 gives keys on far:0, .* on far:1"):
        ContinuousBatcher(of, pool)
    assert_whole(pool)


RUNS = {
    "padded: llama": functools.partial(padded, "llama"),
    "padded: gemma2": functools.partial(padded, "gemma2"),
    "padded: gpt2": functools.partial(padded, "gpt2"),
    "without patch": without_patch,
    "without numbers": without_numbers,
    "beams": beams,
    "packed: llama": functools.partial(batcher, "llama", "packed"),
    "packed: begins elsewhere": functools.partial(batcher, "llama", "packed", main="far:1"),
    "packed: gemma2": functools.partial(batcher, "gemma2", "packed"),
    "states: lfm2": functools.partial(batcher, "lfm2", "padded"),
    "8 bits": eight_bits,
    "memory": memory,
    "prefix file": prefix_file,
    "moved": moved,
}


def main():
    """The traceback of each run that fails, by name."""
    found = {}
    for name, run in RUNS.items():
        torch.manual_seed(0)
        try:
            run()
            found[name] = None
        except Exception:  # noqa: BLE001 (whatever it is, the test shows it)
            found[name] = traceback.format_exc()
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
