"""Slots for keys and values that caches reserve, and those that hold a token; blocks of a beam search.

    python benchmarks/bench_memory.py --factor 4 --block-size 16

Requests are the first 256 of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv), all lengths divided by
`--factor`. Every cache is the real one, fed with random keys and values for one layer; a slot is room for the keys and
values of one token. `generate` never stores the last token of an answer, and neither does this. DynamicCache and
StaticCache run padded batches in order of arrival, until the longest answer is complete.
"""

import csv
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from script import finish, make_results, parse, parser
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from paged_cache import BlockPool, PagedCache, patch
from paged_cache.assets import MODEL_PATH
from paged_cache.bench.measuring import Sample, Somebody, measure
from paged_cache.bench.results import Goal, Line
from paged_cache.bench.workload import TRACE

DIM = 8
SIZES: Any = {"hidden_size": DIM, "intermediate_size": DIM, "vocab_size": DIM}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
OURS, LEAST = "PagedCache", "one prompt and the beams' own tokens"
COLUMNS = ["reserved_slots", "used_slots", "unused_percent", "life_unused_percent", "peak_slots", "kv_bytes"]
Requests = list[tuple[int, int]]


def read_requests(factor: float) -> Requests:
    """Prompt and output lengths, divided by `factor`, at least 1."""
    with TRACE.open() as lines:
        rows = [(int(row["prompt"]), int(row["output"])) for row in csv.DictReader(lines)]
    return [(max(1, round(prompt / factor)), max(1, round(output / factor))) for prompt, output in rows]


def slots(reserved: int, used: int, life_reserved: int, life_used: int) -> Sample:
    """Slots when all requests are complete, and summed over all decode steps (`life`); all caches must use the same."""
    counts = {"reserved_slots": reserved, "used_slots": used}
    counts |= {"life_reserved_slots": life_reserved, "life_used_slots": life_used}
    shares = {"unused_percent": used / reserved, "life_unused_percent": life_used / life_reserved}
    return Sample(used, counts | {name: 100 * (1 - share) for name, share in shares.items()})


def steps(cache: Cache, batch: int, prompt: int, output: int) -> Iterator[int]:
    """Runs a batch through one layer of a cache; yields the columns stored, after the prompt and after each token."""
    for q_len in [prompt] + [1] * (output - 1):
        cache.update(*torch.randn(2, batch, 1, q_len, DIM), 0)
        yield int(cache.get_seq_length())


def paged_slots(requests: Requests, block_size: int) -> Sample:
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
    return slots(reserved, used, life_reserved, life_used)


def padded_slots(requests: Requests, size: int, is_static: bool) -> Sample:
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
    return slots(*counts)


def all_slots(requests: Requests, block_size: int, batches: list[int]) -> list[Line]:
    """A line per kind of cache."""
    caches = [Somebody(OURS, partial(paged_slots, requests, block_size))]
    for size in batches:
        for name, is_static in (("DynamicCache", False), ("StaticCache", True)):
            caches.append(Somebody(f"{name}, batches of {size}", partial(padded_slots, requests, size, is_static)))
    return measure(caches, [OURS], {"requests": len(requests)}, rounds=1, warm_up=0)


class BeamSearch:
    """The package's own model, patched for our cache; blocks are counted in every forward."""

    def __init__(self, num_beams: int, num_prompt: int, num_new: int, block_size: int) -> None:
        self.num_beams, self.num_prompt, self.num_new, self.block_size = num_beams, num_prompt, num_new, block_size
        self.model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval()
        self.ids = torch.randint(3, self.model.config.vocab_size, (1, num_prompt))

    def lines(self) -> list[Line]:
        """Both caches, and the least slots that can do."""
        case = {"num_beams": self.num_beams, "prompt_len": self.num_prompt, "output_len": self.num_new}
        caches = [Somebody("DynamicCache", self._dynamic), Somebody(OURS, self._paged)]
        least = self.num_prompt + self.num_beams * (self.num_new - 1)
        return [*measure(caches, [OURS], case, rounds=1, warm_up=0), Line(case, LEAST, {"peak_slots": [least]})]

    def _dynamic(self) -> Sample:
        cache: Any = DynamicCache(config=self.model.config)
        answer = self._generate(cache)
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        rows, _, length, _ = cache.layers[0].keys.shape
        return Sample(answer, {"peak_slots": rows * length, "kv_bytes": nbytes})

    def _paged(self) -> Sample:
        num_blocks = -(-self.num_prompt // self.block_size) + 2 * self.num_beams * (self.num_new // self.block_size + 2)
        pool = BlockPool.for_model(self.model, num_blocks=num_blocks, block_size=self.block_size)
        counts: list[int] = []
        hook = self.model.register_forward_hook(lambda *_: counts.append(pool.stats().num_referenced))
        with patch(self.model), PagedCache(pool) as cache:
            answer = self._generate(cache)
            at_end = len({block for row in cache.block_tables for block in row[0]})
        hook.remove()
        slots, nbytes = max(counts) * self.block_size, max(counts) * self.block_size * pool.bytes_per_token
        return Sample(answer, {"peak_slots": slots, "slots_at_end": at_end * self.block_size, "kv_bytes": nbytes})

    def _generate(self, cache: Cache) -> list[int]:
        lengths = {"min_new_tokens": self.num_new, "max_new_tokens": self.num_new}
        search: Any = {"num_beams": self.num_beams, "do_sample": False, "past_key_values": cache}
        return self.model.generate(self.ids, **search, **lengths)[0].tolist()  # type: ignore[no-any-return]


def main(arguments: list[str] | None = None) -> None:
    """Counts slots of requests, and of a beam search."""
    options = parser(__doc__)
    options.add_argument("--factor", type=float, default=4.0, help="lengths of the trace are divided by it")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="of the padded caches")
    options.add_argument("--beams", nargs=3, type=int, default=[8, 2048, 32], help="beams, prompt, new tokens")
    args = parse(options, arguments, __file__, {"batches": [32], "beams": [8, 2048, 8]})
    requests = read_requests(args.factor)
    title = "Memory: slots for the keys and values of one token that caches reserve, and those that hold one"
    goals = [
        Goal("slots of finished requests that hold nothing", "unused_percent", OURS, at_most=4),
        Goal("slots that hold nothing, over all steps", "life_unused_percent", OURS, at_most=4),
        Goal("slots of a beam search over the least possible", "peak_slots", OURS, LEAST, at_most=1.1),
    ]
    parts: dict[str, Any] = {
        "columns": COLUMNS,
        "compared": ["reserved_slots", "kv_bytes"],
        "ours": [OURS],
        "goals": goals,
    }
    results = make_results(args, "memory", title, ["factor", "block_size", "batches", "beams"], **parts)
    results.details = {"mean_tokens": sum(map(sum, requests)) / len(requests)}
    results.lines = all_slots(requests, args.block_size, args.batches)
    num_beams, num_prompt, num_new = args.beams
    results.lines += BeamSearch(num_beams, num_prompt, num_new, args.block_size).lines()
    finish(results, args)


if __name__ == "__main__":
    main()
