"""A decode step on CPU: a patched model with `PagedCache` against the same model with `DynamicCache` and SDPA.

    python benchmarks/bench_decode_step.py --batches 1 8 32 --contexts 128 512 2048 8192

The model is a random Llama: hidden size 512, 8 query and 4 kv heads x 64, a tiny MLP, fp32. `layer` is the time from the
call of `cache.update` to the result of the attention, per layer; `step` is the whole forward, which also pays once for
blocks, tables and masks. The blocks lie in random order. Both caches hold the same tokens and take their steps in turns;
all outputs are compared, and nothing is shown if they differ. `GB/s` is K and V once, over the fastest `layer`.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaModel

import paged_cache
from paged_cache import BlockPool, PagedCache, patch

FOLDER = Path(__file__).resolve().parent
HEADS, KV_HEADS, DIM, LAYERS, VOCAB, BLOCK_SIZE = 8, 4, 64, 2, 64, 16
GROWTH = 32  # tokens that a cache grows beyond the context before it is cropped
WARM_UP, FEWEST_ROUNDS, TOLERANCE, LOAD, MEMORY = 3, 8, 1e-4, 1.5, 3 * 2**30

Times = dict[str, float]


@dataclass(frozen=True)
class Line:
    """One batch and context; `layer` and `step` by the name of the cache."""

    batch: int
    context: int
    rounds: int
    worst_difference: float
    layer: dict[str, Times]
    step: dict[str, Times]


class Candidate:
    """A model, a cache, and the times of its steps."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.layer, self.step = list[float](), list[float]()
        self._update, self._start, self._in_layers = cache.update, 0.0, 0.0
        cache.update = self._timed_update
        for layer in model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(self._stop)

    def _timed_update(self, *args: Any, **kwargs: Any) -> Any:
        self._start = time.perf_counter()
        return self._update(*args, **kwargs)

    def _stop(self, *_: Any) -> None:
        self._in_layers += time.perf_counter() - self._start

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """One step, timed."""
        self._in_layers, start = 0.0, time.perf_counter()
        output = self.model(input_ids=ids, past_key_values=self.cache).last_hidden_state
        self.step.append(time.perf_counter() - start)
        self.layer.append(self._in_layers / LAYERS)
        return torch.as_tensor(output)


def models() -> tuple[LlamaModel, LlamaModel]:
    """Two with the same weights, the first one patched."""
    sizes: Any = {"hidden_size": HEADS * DIM, "intermediate_size": 16, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "attn_implementation": "sdpa"}
    paged, dense = (LlamaModel(LlamaConfig(**sizes)).eval() for _ in range(2))
    dense.load_state_dict(paged.state_dict())
    patch(paged)
    return paged, dense


def shuffled_pool(model: LlamaModel, num_blocks: int) -> BlockPool:
    """A pool whose free blocks are in random order, as after some time of use."""
    pool = BlockPool.for_model(model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    with PagedCache(pool) as cache:
        cache.update(*torch.zeros(2, num_blocks, KV_HEADS, 1, DIM), 0)
        cache.batch_select_indices(torch.randperm(num_blocks))
    return pool


def candidates(batch: int, context: int) -> dict[str, Candidate]:
    """Both, with the same random tokens in their caches."""
    paged, dense = models()
    pool = shuffled_pool(paged, batch * -(-(context + GROWTH) // BLOCK_SIZE))
    dynamic = DynamicCache(config=dense.config)
    result = {"paged": Candidate(paged, PagedCache(pool)), "dynamic": Candidate(dense, dynamic)}
    for layer in range(LAYERS):
        keys, values = (torch.randn(batch, KV_HEADS, context, DIM) for _ in range(2))
        for candidate in result.values():
            candidate.cache.update(keys, values, layer)
    return result


def measure(batch: int, context: int, seconds: float) -> Line:
    """Steps in turns for about so many seconds."""
    runs = candidates(batch, context)
    end, rounds, worst = time.perf_counter() + seconds, 0, 0.0
    while rounds < WARM_UP + FEWEST_ROUNDS or time.perf_counter() < end:
        ids = torch.randint(VOCAB, (batch, 1))
        paged, dense = (run.run(ids) for run in runs.values())
        worst = max(worst, (paged - dense).abs().max().item())
        if not worst < TOLERANCE:
            raise SystemExit(f"outputs differ by {worst}: no times for wrong results")
        rounds += 1
        if rounds % GROWTH == 0:
            for run in runs.values():
                run.cache.crop(-GROWTH)
    layer, step = ({name: times(getattr(run, of)) for name, run in runs.items()} for of in ("layer", "step"))
    return Line(batch, context, rounds - WARM_UP, worst, layer, step)


def times(seconds: list[float]) -> Times:
    """Milliseconds, without the first rounds."""
    seconds = [1e3 * x for x in seconds[WARM_UP:]]
    first, median, third = statistics.quantiles(seconds, n=4)
    return {"fastest": min(seconds), "quartile_1": first, "median": median, "quartile_3": third}


def kv_bytes(batch: int, context: int) -> int:
    """Of one layer in fp32."""
    return 2 * batch * context * KV_HEADS * DIM * 4


def show(line: Line) -> None:
    """One row of the table."""
    size = kv_bytes(line.batch, line.context)
    print(f"{line.batch:3} x {line.context:5} {size / 2**20:6.1f}", end="")
    for both in (line.layer, line.step):
        paged, dynamic = both["paged"], both["dynamic"]
        for x in (paged, dynamic):
            print(f" | {x['fastest']:7.3f} {x['median']:7.3f}", end="")
            print(f" [{x['quartile_1']:.3f}, {x['quartile_3']:.3f}]", end="")
        print(f" | {dynamic['fastest'] / paged['fastest']:5.2f} {dynamic['median'] / paged['median']:5.2f}", end="")
    print(f" | {size / line.layer['paged']['fastest'] / 1e6:5.1f} | {line.rounds}", flush=True)


def environment(seed: int) -> dict[str, Any]:
    """What the numbers depend on."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, paged_cache)}
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, load {load:.1f}")
    if load > LOAD:
        print("WARNING: other jobs keep this machine busy: look at the fastest times, not at medians.")
    device = {"device": f"cpu, {platform.machine()}", "threads": torch.get_num_threads(), "load": load}
    return device | {"versions": versions, "commit": commit or None, "seed": seed}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=6.0, help="per line")
    parser.add_argument("--threads", type=int, default=1, help="two wait for each other on a busy machine")
    parser.add_argument("--quick", action="store_true", help="two small lines: does it run, do the outputs agree")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "decode_step.json")
    args = parser.parse_args(arguments)
    if args.quick:
        args.batches, args.contexts, args.seconds = [1, 2], [128], 0.1
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    result = environment(args.seed)
    print("ms: fastest, median [quartiles]; dynamic / paged of fastest and median: above 1, paged is faster")
    print("batch x context, MiB | layer: paged | dynamic | ratio | step: paged | dynamic | ratio | GB/s | rounds")
    lines = []
    for batch, context in itertools.product(args.batches, args.contexts):
        if (2 * LAYERS + 1) * kv_bytes(batch, context) > MEMORY:
            print(f"{batch:3} x {context:5} left out: more than {MEMORY / 2**30:g} GiB")
            continue
        lines.append(measure(batch, context, args.seconds))
        show(lines[-1])
        gc.collect()  # candidates and their caches know each other
    result["lines"] = [asdict(line) for line in lines]
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
