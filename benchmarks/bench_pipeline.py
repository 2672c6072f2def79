"""transformers' text-generation pipeline with `batch_size` 1, 8 and 32, against the same one paged.

    python benchmarks/bench_pipeline.py
    python benchmarks/bench_pipeline.py --model shipped --rounds 3

Prompts are pieces of a Python source with the lengths of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv)
divided by `--factor`, in the trace's order. A random share of the vocabulary ends an answer, so that answers have all
lengths up to `--max-new-tokens`. All records are compared with those of `batch_size=1`: whoever has others gets no times, and
if it is the paged pipeline the benchmark fails.
"""

import argparse
import inspect
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from script import finish, make_results, parse, parser, progress
from transformers import AutoTokenizer, pipeline

from paged_cache.assets import MODEL_PATH
from paged_cache.bench.measuring import Somebody, Wrong, measure, timed
from paged_cache.bench.models import SHIPPED, count_parameters, make_model
from paged_cache.bench.results import Line
from paged_cache.bench.workload import read_lengths
from paged_cache.integrations import paged_pipeline

PAGED, ONE = "paged", "batch_size=1"
QUICK = {"prompts": 8, "factor": 20.0, "rounds": 1, "max_new_tokens": 12, "model": SHIPPED}
WARM = 8
Serve = Callable[[list[str]], list[Any]]


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


def require_equal(found: list[Any], expected: list[Any]) -> None:
    """Raises `Wrong` if records differ."""
    equal = sum(mine == theirs for mine, theirs in zip(found, expected, strict=True))
    if equal < len(expected):
        raise Wrong(f"{equal} of {len(expected)} records are those of {ONE}")


def compare(args: argparse.Namespace, who: dict[str, Serve], prompts: list[str]) -> list[Line]:
    """Everybody, in turns; first with few prompts, which does not count."""
    check = require_equal if args.dtype == "float32" else lambda found, expected: None
    lines: list[Line] = []
    with progress((args.rounds + 1) * len(who)) as bar:
        for some, rounds in ((prompts[:WARM], 1), (prompts, args.rounds)):
            people = [Somebody(name, timed(partial(serve, some))) for name, serve in who.items()]
            case = {"prompts": len(some)}
            lines = measure(people, [PAGED], case, rounds=rounds, warm_up=0, check=check, tick=lambda _: bar.update())
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measures the pipelines."""
    options = parser(__doc__, rounds=2)
    options.add_argument("--model", choices=["28m", SHIPPED], default="28m")
    options.add_argument("--prompts", type=int, default=200)
    options.add_argument("--factor", type=float, default=10.0, help="by which the trace's lengths are divided")
    options.add_argument("--max-new-tokens", type=int, default=96)
    options.add_argument("--ends", type=float, default=0.04, help="share of the vocabulary that ends an answer")
    options.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32], help="1 is the reference")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32", help="only in float32 are equal records demanded")
    args = parse(options, arguments, __file__, QUICK)
    title = f"transformers' text-generation pipeline, and the same one paged ({args.model} model)"
    names = ["model", "prompts", "factor", "max_new_tokens", "ends", "batch_sizes", "device", "dtype"]
    parts: dict[str, Any] = {"columns": ["elapsed_time"], "compared": ["elapsed_time"], "ours": [PAGED]}
    results = make_results(args, f"pipeline_{args.model}", title, names, **parts)
    model = make_model(args.model, args.device, getattr(torch, args.dtype), args.seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device=args.device)
    prompts = make_prompts(tokenizer, args.prompts, args.factor, args.seed)
    with paged_pipeline(pipe) as paged:
        served = everybody(pipe, paged, args.batch_sizes, make_options(args, model.config.vocab_size))
        results.lines = compare(args, served, prompts)
        stats = paged.batcher.stats()
    results.details = {
        "parameters": count_parameters(model),
        "steps": stats.num_steps,
        "tokens": stats.num_generated_tokens,
    }
    finish(results, args)


if __name__ == "__main__":
    main()
