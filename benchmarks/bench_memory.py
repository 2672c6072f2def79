"""Slots for keys and values that caches reserve, and those that hold a token; blocks of a beam search.

    python benchmarks/bench_memory.py --factor 4 --block-size 16

Requests are the first 256 of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv), all lengths divided by
`--factor`. Every cache is the real one, fed with random keys and values for one layer; a slot is room for the keys and
values of one token. `generate` never stores the last token of an answer, and neither does this. DynamicCache and
StaticCache run padded batches in order of arrival, until the longest answer is complete.
"""

import argparse
import csv
import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

import paged_cache
from paged_cache import BlockPool, PagedCache, patch
from paged_cache.assets import MODEL_PATH
from paged_cache.bench.workload import TRACE

FOLDER = Path(__file__).resolve().parent
DIM = 8
SIZES: Any = {"hidden_size": DIM, "intermediate_size": DIM, "vocab_size": DIM}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
Requests = list[tuple[int, int]]


@dataclass(frozen=True)
class Slots:
    """Slots of one kind of cache: when all requests are complete, and summed over all decode steps (`life`)."""

    name: str
    reserved: int
    used: int
    life_reserved: int
    life_used: int

    @property
    def unused_percent(self) -> float:
        """Of the slots reserved at the end."""
        return 100 * (1 - self.used / self.reserved)

    @property
    def life_unused_percent(self) -> float:
        """Of the slots reserved, on average over the steps in which a request is served."""
        return 100 * (1 - self.life_used / self.life_reserved)


@dataclass(frozen=True)
class Beams:
    """A beam search; `ideal_slots` are one prompt and the tokens that the beams added."""

    num_beams: int
    num_prompt: int
    num_own: int
    ideal_slots: int
    slots: int
    peak_slots: int
    nbytes: int
    dynamic_nbytes: int
    is_identical: bool

    @property
    def ratio(self) -> float:
        """Most slots in use at any time, against the least possible."""
        return self.peak_slots / self.ideal_slots


def read_requests(factor: float) -> Requests:
    """Prompt and output lengths, divided by `factor`, at least 1."""
    with TRACE.open() as lines:
        rows = [(int(row["prompt"]), int(row["output"])) for row in csv.DictReader(lines)]
    return [(max(1, round(prompt / factor)), max(1, round(output / factor))) for prompt, output in rows]


def steps(cache: Cache, batch: int, prompt: int, output: int) -> Iterator[int]:
    """Runs a batch through one layer of a cache; yields the columns stored, after the prompt and after each token."""
    for q_len in [prompt] + [1] * (output - 1):
        cache.update(*torch.randn(2, batch, 1, q_len, DIM), 0)
        yield int(cache.get_seq_length())


def paged_slots(requests: Requests, block_size: int) -> Slots:
    """One `PagedCache` per request; all of them live until the last is complete."""
    num_blocks = sum(-(-sum(request) // block_size) for request in requests)
    pool = BlockPool.for_model(LlamaForCausalLM(CONFIG), num_blocks=num_blocks, block_size=block_size)
    caches, life_reserved, life_used = [], 0, 0
    for request in requests:
        cache, before = PagedCache(pool), pool.stats().num_referenced
        for length in steps(cache, 1, *request):
            life_reserved += (pool.stats().num_referenced - before) * block_size
            life_used += length
        caches.append(cache)
    pool.check()
    reserved, used = pool.stats().num_referenced * block_size, sum(int(cache.get_seq_length()) for cache in caches)
    return Slots(f"PagedCache, blocks of {block_size}", reserved, used, life_reserved, life_used)


def padded_slots(requests: Requests, size: int, is_static: bool) -> Slots:
    """Batches of `size` requests, each as long as its longest prompt and its longest answer."""
    counts = [0, 0, 0, 0]
    for i in range(0, len(requests), size):
        rows = requests[i : i + size]
        prompt, output = (max(lengths) for lengths in zip(*rows, strict=True))
        cache: Any = (
            StaticCache(CONFIG, max_cache_len=prompt + output - 1) if is_static else DynamicCache(config=CONFIG)
        )
        reserved = used = 0
        for step, _ in enumerate(steps(cache, len(rows), prompt, output)):
            keys = cache.layers[0].keys
            reserved, used = keys.shape[0] * keys.shape[2], sum(p + min(step, o - 1) for p, o in rows)
            counts[2] += reserved
            counts[3] += used
        counts[0] += reserved
        counts[1] += used
    return Slots(f"{'StaticCache' if is_static else 'DynamicCache'}, batches of {size}", *counts)


def beam_search(num_beams: int, num_prompt: int, num_new: int, block_size: int = 16) -> Beams:
    """The package's own model, patched, against the same search with `DynamicCache`; blocks counted in every forward."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, num_prompt))
    num_blocks = -(-num_prompt // block_size) + 2 * num_beams * (num_new // block_size + 2)
    pool = BlockPool.for_model(model, num_blocks=num_blocks, block_size=block_size)
    counts: list[int] = []
    outputs = []
    caches: tuple[Any, Any] = (PagedCache(pool), DynamicCache(config=model.config))
    hook = model.register_forward_hook(lambda *_: counts.append(pool.stats().num_referenced))
    for cache in caches:
        with patch(model) if cache is caches[0] else nullcontext():
            length = {"min_new_tokens": num_new, "max_new_tokens": num_new}
            outputs.append(model.generate(ids, past_key_values=cache, num_beams=num_beams, do_sample=False, **length))
    hook.remove()
    used = len({block for row in caches[0].block_tables for block in row[0]}) * block_size
    dynamic_nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[1].layers)
    ideal, peak = num_prompt + num_beams * (num_new - 1), max(counts) * block_size
    sizes = (ideal, used, peak, peak * pool.bytes_per_token, dynamic_nbytes)
    return Beams(num_beams, num_prompt, num_new - 1, *sizes, torch.equal(*outputs))


def environment(seed: int) -> dict[str, Any]:
    """What the numbers depend on."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, paged_cache)}
    return {"device": f"cpu, {platform.machine()}", "versions": versions, "commit": commit or None, "seed": seed}


def main(arguments: list[str] | None = None) -> None:
    """Prints both tables and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--factor", type=float, default=4.0, help="lengths of the trace are divided by it")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="of the padded caches")
    parser.add_argument("--beams", nargs=3, type=int, default=[8, 2048, 32], help="beams, prompt, new tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "memory.json")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)

    requests = read_requests(args.factor)
    mean = sum(map(sum, requests)) / len(requests)
    print(f"{len(requests)} requests, lengths divided by {args.factor:g}: {mean:.0f} tokens on average")
    table = [paged_slots(requests, args.block_size)]
    table += [padded_slots(requests, size, is_static) for size in args.batches for is_static in (False, True)]
    print(f"{'':30} {'reserved':>9} {'used':>9} {'unused at the end':>18} {'unused over life':>17}")
    for row in table:
        shares = f"{row.unused_percent:16.2f} % {row.life_unused_percent:15.2f} %"
        print(f"{row.name:30} {row.reserved:9} {row.used:9} {shares}")
    beams = beam_search(*args.beams)
    print(
        f"\n{beams.num_beams} beams, prompt of {beams.num_prompt}, {beams.num_own} stored tokens each: at most "
        f"{beams.peak_slots} slots, {beams.slots} at the end;\none prompt and the beams' own tokens are "
        f"{beams.ideal_slots}: ratio {beams.ratio:.3f}. {beams.nbytes / 2**20:.1f} MiB, DynamicCache "
        f"{beams.dynamic_nbytes / 2**20:.1f} MiB. Tokens identical: {beams.is_identical}"
    )
    rows = [
        asdict(x) | {"unused_percent": x.unused_percent, "life_unused_percent": x.life_unused_percent} for x in table
    ]
    result = environment(args.seed) | {"factor": args.factor, "num_requests": len(requests), "mean_tokens": mean}
    result |= {"slots": rows, "beams": asdict(beams) | {"ratio": beams.ratio}}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
