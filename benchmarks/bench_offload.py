"""What host memory for evicted blocks is worth: the same trace in the same small pool, with and without it.

    python benchmarks/bench_offload.py

- *preempted*: requests whose answers turn out longer than expected take blocks from each other all the time. A preempted
  one computes its tokens again, or gets its blocks back.
- *conversations*: turns of several conversations, one after the other, in a pool that holds few of them. A turn begins with
  all that was said before.

First everybody's tokens are compared with those of a pool that is large enough; then the two are timed in turns.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.bench.models import kv_bytes_per_token, make_model
from paged_cache.demo import count_tokens

FOLDER = Path(__file__).resolve().parent
VOCABULARY = 256
Tokens = list[list[int]]


@dataclass(frozen=True)
class Trace:
    """Prompts, and how they come.

    Attributes:
        num_new: Tokens of each answer.
        num_turns: How often each goes on with its answer and `num_said` more tokens; all at once where it is 1.
        num_blocks: Of the pool.
    """

    name: str
    prompts: Tokens
    num_new: int
    num_turns: int
    num_said: int
    num_blocks: int

    @property
    def longest(self) -> int:
        """Tokens of all prompts and answers together."""
        return sum(map(len, self.prompts)) + len(self.prompts) * self.num_turns * (self.num_new + self.num_said)


def traces(is_quick: bool, block_size: int, seed: int) -> list[Trace]:
    """The two workloads."""
    draw = random.Random(seed)

    def prompts(count: int, low: int, high: int) -> Tokens:
        return [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(low, high))] for _ in range(count)]

    if is_quick:
        return [
            Trace("preempted", prompts(8, 20, 40), 48, 1, 0, 200 // block_size),
            Trace("conversations", prompts(4, 40, 60), 4, 2, 8, 120 // block_size),
        ]
    return [
        Trace("preempted", prompts(20, 100, 200), 200, 1, 0, 3200 // block_size),
        Trace("conversations", prompts(6, 400, 600), 16, 3, 32, 1200 // block_size),
    ]


def serve(model: Any, trace: Trace, num_blocks: int, block_size: int, offload: str | None) -> dict[str, Any]:
    """One run over a trace; its answers are under "answers"."""
    pool = BlockPool.for_model(model, num_blocks=num_blocks, block_size=block_size, offload_memory=offload)
    options = {"max_new_tokens": trace.num_new, "do_sample": False, "expected_tokens": 1}
    histories, answers = [list(prompt) for prompt in trace.prompts], []
    with ContinuousBatcher(model, pool, policy="fcfs") as batcher, count_tokens(model) as counts:
        start = time.perf_counter()
        for turn in range(trace.num_turns):
            groups = [histories] if trace.num_turns == 1 else [[history] for history in histories]
            for group in groups:
                for history, output in zip(group, batcher.generate(group, progress_bar=False, **options), strict=True):
                    answers.append(list(output.generated_tokens))
                    said = random.Random(turn * 1000 + len(answers))
                    history += answers[-1] + [said.randrange(1, VOCABULARY) for _ in range(trace.num_said)]
        seconds = time.perf_counter() - start
        num_preemptions = batcher.stats().num_preemptions
    stats, costs = pool.stats(), pool.manager.host.costs
    return {
        "seconds": seconds,
        "num_computed": sum(counts),
        "num_preemptions": num_preemptions,
        "offloaded": stats.offloaded,
        "restored": stats.restored,
        "not_offloaded": stats.not_offloaded,
        "us_per_block": 1e6 * (costs.seconds_per_block or 0) or None,
        "us_per_token": 1e6 * (costs.seconds_per_token or 0) or None,
        "answers": answers,
    }


def compare(model: Any, trace: Trace, args: argparse.Namespace) -> dict[str, Any]:
    """One trace with and without host memory, in turns."""
    enough = serve(model, trace, trace.longest // args.block_size + 100, args.block_size, None)["answers"]
    rounds: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for number in range(args.rounds):
        for name in ("without", "with") if number % 2 == 0 else ("with", "without"):
            run = serve(model, trace, trace.num_blocks, args.block_size, args.offload if name == "with" else None)
            if run.pop("answers") != enough:
                raise SystemExit(f"{trace.name}, {name} host memory: other tokens than in a pool that is large enough")
            rounds[name].append(run)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds["without"], rounds["with"], strict=True)]
    line: dict[str, Any] = {"trace": trace.name, "num_requests": len(trace.prompts), "num_turns": trace.num_turns}
    line |= {
        "num_blocks": trace.num_blocks,
        "is_identical": True,
        "speedup": statistics.median(ratios),
        "ratios": ratios,
    }
    return line | {name: runs[-1] | {"seconds": [run["seconds"] for run in runs]} for name, runs in rounds.items()}


def show(line: dict[str, Any]) -> None:
    """A trace in three lines."""
    print(f"{line['trace']}: {line['num_requests']} requests, {line['num_turns']} turns, {line['num_blocks']} blocks")
    for name in ("without", "with"):
        run = line[name]
        print(
            f"  {name:8} {statistics.median(run['seconds']):7.2f} s {run['num_computed']:7} tokens computed "
            f"{run['num_preemptions']:4} preemptions {run['offloaded']:6} blocks out {run['restored']:6} back"
        )
    print(f"  {line['speedup']:.2f} times as fast, same tokens")


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    versions["paged_cache"] = paged_cache.__version__
    machine = {"device": f"cpu, {platform.machine()}", "num_threads": torch.get_num_threads()}
    return machine | {"versions": versions, "commit": commit or None, "seed": args.seed, "model": args.model}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="28m", help="tiny, 28m, 8b or shipped")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--offload", default="1GiB", help="host memory")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few tokens: does it run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "offload.json")
    args = parser.parse_args(arguments)
    if args.quick:
        args.model, args.block_size, args.rounds, args.offload = "tiny", 4, 1, "16MiB"
    return args


def main(arguments: list[str] | None = None) -> None:
    """Prints both traces and writes the JSON file."""
    args = parse(arguments)
    model = make_model(args.model, seed=args.seed)
    print(f"{args.model}, {kv_bytes_per_token(model)} bytes of K and V per token, blocks of {args.block_size} tokens")
    lines = []
    for trace in traces(args.quick, args.block_size, args.seed):
        lines.append(compare(model, trace, args))
        show(lines[-1])
    result = environment(args) | {"block_size": args.block_size, "offload": args.offload, "lines": lines}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
