"""transformers' text-generation pipeline with `batch_size` 1, 8 and 32, against the same one paged.

    python benchmarks/bench_pipeline.py
    python benchmarks/bench_pipeline.py --model shipped --rounds 3

Prompts are pieces of a Python source with the lengths of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv)
divided by `--factor`, in the trace's order. A random share of the vocabulary ends an answer, so that answers have all
lengths up to `--max-new-tokens`. One process, rounds in turns, every other one backwards; before the first one everybody
serves the first prompts, untimed. All records are compared with those of `batch_size=1`: `equal` counts them, and if the
paged pipeline has others the benchmark fails.
"""

import argparse
import inspect
import json
import os
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, pipeline

from paged_cache.assets import MODEL_PATH
from paged_cache.bench.models import SHIPPED, count_parameters, make_model
from paged_cache.bench.results import Spread
from paged_cache.bench.workload import read_lengths
from paged_cache.integrations import paged_pipeline
from paged_cache.bench.results import environment

RESULTS = Path(__file__).resolve().parent / "results"
PAGED, ONE = "paged", "batch_size=1"
QUICK = {"prompts": 8, "factor": 20.0, "rounds": 1, "max_new_tokens": 12, "model": SHIPPED}
WARM = 8
LOAD = 1.5
Serve = Callable[[list[str]], list[Any]]
Round = dict[str, dict[str, Any]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["28m", SHIPPED], default="28m")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--factor", type=float, default=10.0, help="by which the trace's lengths are divided")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--ends", type=float, default=0.04, help="share of the vocabulary that ends an answer")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32], help="1 is the reference")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="only in float32 are equal records demanded")
    parser.add_argument("--quick", action="store_true", help="few short prompts: does it run, is it right")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; by default in results/, with --quick none")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    if args.output is None and not args.quick:
        args.output = RESULTS / f"pipeline_{args.model}.json"
    return args


def make_prompts(tokenizer: Any, count: int, factor: float, seed: int) -> list[str]:
    """Pieces of a source, of the trace's lengths in tokens."""
    ids = tokenizer(inspect.getsource(argparse), add_special_tokens=False, verbose=False)["input_ids"]
    chance = random.Random(seed)
    lengths = [min(length, len(ids)) for length, _ in read_lengths(count, factor)]
    starts = [chance.randrange(len(ids) - length + 1) for length in lengths]
    return [tokenizer.decode(ids[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def make_options(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Of every call."""
    chance = random.Random(args.seed)
    ends = [token for token in range(1, vocab_size) if chance.random() < args.ends]
    return {"do_sample": False, "max_new_tokens": args.max_new_tokens, "eos_token_id": ends, "return_full_text": False}


def everybody(pipe: Any, paged: Any, batch_sizes: list[int], options: dict[str, Any]) -> dict[str, Serve]:
    """By name: who serves prompts."""
    sizes = dict.fromkeys([1, *batch_sizes])
    others: dict[str, Serve] = {f"batch_size={size}": partial(pipe, batch_size=size, **options) for size in sizes}
    return others | {PAGED: partial(paged, progress_bar=False, **options)}


def play(who: dict[str, Serve], prompts: list[str], is_backwards: bool, tick: Callable[[], Any]) -> Round:
    """Everybody serves all prompts; seconds, and records equal to those of `batch_size=1`."""
    outputs, seconds = {}, {}
    for name in reversed(who) if is_backwards else who:
        started = time.perf_counter()
        outputs[name] = who[name](prompts)
        seconds[name] = time.perf_counter() - started
        tick()
    expected = outputs[ONE]
    return {
        name: {
            "seconds": seconds[name],
            "equal": sum(mine == theirs for mine, theirs in zip(outputs[name], expected, strict=True)),
        }
        for name in who
    }


def require_equal(found: Round, num_prompts: int, is_exact: bool) -> Round:
    """Ends the program if the paged pipeline is wrong."""
    if is_exact and found[PAGED]["equal"] < num_prompts:
        raise SystemExit(f"{PAGED}: {found[PAGED]['equal']} of {num_prompts} records are those of {ONE}")
    return found


def compare(args: argparse.Namespace, who: dict[str, Serve], prompts: list[str]) -> list[Round]:
    """Warms up, checks, and measures."""
    is_exact, rounds = args.dtype == "float32", []
    with tqdm(total=(args.rounds + 1) * len(who), unit="run", disable=None) as progress:
        first = prompts[:WARM]
        require_equal(play(who, first, False, progress.update), len(first), is_exact)
        for number in range(args.rounds):
            found = play(who, prompts, bool(number % 2), progress.update)
            rounds.append(require_equal(found, len(prompts), is_exact))
    return rounds


def ratios(rounds: list[Round]) -> dict[str, Spread]:
    """How many times as fast the paged pipeline is, in the same round."""
    names = [name for name in rounds[0] if name != PAGED]
    return {name: Spread.of(one[name]["seconds"] / one[PAGED]["seconds"] for one in rounds) for name in names}


def table(rounds: list[Round], num_prompts: int) -> str:
    """A line for each."""
    times, lines = ratios(rounds), [f"{'':14}{'equal':>6} {'seconds':>22} {'prompts/s':>10}   paged is faster by"]
    for name in rounds[0]:
        seconds = Spread.of(one[name]["seconds"] for one in rounds)
        equal = min(one[name]["equal"] for one in rounds)
        ratio = show(times[name]) if name in times else ""
        lines.append(f"{name:14}{equal:6} {show(seconds):>22} {num_prompts / seconds.median:10.1f}   {ratio}")
    return "\n".join(lines)


def show(spread: Spread) -> str:
    """Median [least, most]."""
    return f"{spread.median:.2f} [{spread.min:.2f}, {spread.max:.2f}]"


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and writes the JSON file."""
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    model = make_model(args.model, args.device, getattr(torch, args.dtype), args.seed)
    pipe = pipeline(
        "text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(MODEL_PATH), device=args.device
    )
    prompts = make_prompts(pipe.tokenizer, args.prompts, args.factor, args.seed)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "quick")}
    found = {"device": f"{args.device}, {platform.machine()}", "load": os.getloadavg()[0], **environment(args.seed)}
    found |= {"parameters": count_parameters(model), "settings": settings}
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    if found["load"] > LOAD:
        print("WARNING: other jobs keep this machine busy.")
    with paged_pipeline(pipe) as paged:
        options = make_options(args, model.config.vocab_size)
        rounds = compare(args, everybody(pipe, paged, args.batch_sizes, options), prompts)
        found |= {"steps": paged.batcher.stats().num_steps, "tokens": paged.batcher.stats().num_generated_tokens}
    print(table(rounds, len(prompts)))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        found |= {"rounds": rounds, "ratios": {name: vars(ratio) for name, ratio in ratios(rounds).items()}}
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
