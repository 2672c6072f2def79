"""Many requests at once: this package's batcher against a loop of `generate`, padded batches and transformers' own batching.

    python benchmarks/bench_batching.py
    python benchmarks/bench_batching.py --rounds 1 --shared 256 --add
    python benchmarks/bench_batching.py --profile
    python benchmarks/bench_batching.py --soak 10000

Requests are those of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv), lengths divided by `--factor`, tokens
at random, all there at the beginning; with `--shared 256` all prompts start with the same 256 tokens. Everybody generates
the same number of tokens per request, greedily. One process, rounds in turns; before the first one everybody serves the
first requests, untimed. Each timed run is compared with the loop, token by token: whoever has other tokens gets no times,
and if it is this package the benchmark fails. `--profile` takes the steps of the batcher apart, and `--soak` serves very many
random requests in a pool that is too small, with cancellations. The package `batching` beside this file has the parts.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from batching import measuring, ours, peers, profiling, report, soak
from batching.measuring import Candidate, Comparison
from tqdm import tqdm

from paged_cache.bench import models
from paged_cache.bench.workload import Workload, make_workload
from paged_cache.bench.results import environment

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = ("loop", "padded", *peers.GENERATE_BATCH, *measuring.OURS)
LOAD = 1.5
QUICK = {"requests": 8, "factor": 20.0, "rounds": 1}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=models.NAMES, help="28m; with --profile shipped, with --soak tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--factor", type=float, default=5.0, help="by which the trace's lengths are divided")
    parser.add_argument(
        "--shared", nargs="+", type=int, default=[0, 256], help="tokens of a system prompt, a line each"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="the first one is the reference")
    parser.add_argument("--padded-size", type=int, default=8, help="requests in a padded batch")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="of this package's batcher")
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024, help="the same")
    parser.add_argument("--room", type=float, default=1.0, help="size of the pool, of what all requests need at once")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="only in float32 are equal tokens demanded")
    parser.add_argument("--add", action="store_true", help="to the rounds that the JSON file has, of equal settings")
    parser.add_argument("--profile", type=int, nargs="?", const=32, metavar="SEQUENCES", help="parts of a step")
    parser.add_argument("--soak", type=int, nargs="?", const=10_000, metavar="REQUESTS", help="does it ever fall over")
    parser.add_argument(
        "--quick", action="store_true", help="few short requests, a tiny model: does it run, is it right"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; by default in results/, with --quick none")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    args.model = args.model or ("tiny" if args.quick else None)
    kind = "_profile" if args.profile else "_soak" if args.soak else ""
    args.model = args.model or {"": "28m", "_profile": models.SHIPPED, "_soak": "tiny"}[kind]
    if args.output is None and not args.quick:
        args.output = RESULTS / f"batching{kind}.json"
    return args


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """Of this package's batcher."""
    return {name: getattr(args, name) for name in ("max_num_seqs", "max_num_batched_tokens")}


def candidates(args: argparse.Namespace, model: Any) -> list[Candidate]:
    """Those that were asked for."""
    everybody: list[Candidate] = [
        peers.Loop(model),
        peers.Padded(model, size=args.padded_size),
        peers.GenerateBatch(model),
        *(ours.Ours(model, policy, args.room, limits(args)) for policy in measuring.OURS),
    ]
    return [candidate for name in args.only for candidate in everybody if candidate.name == name]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that must be equal for rounds to belong together."""
    names = ("model", "requests", "factor", "only", "room", "device", "dtype", "threads")
    return {name: getattr(args, name) for name in names}


def earlier(args: argparse.Namespace) -> dict[int, Comparison]:
    """The rounds of the JSON file, by the number of shared tokens."""
    if not (args.add and args.output.exists()):
        return {}
    found, comparisons = report.load(args.output)
    if found["settings"] != settings(args):
        raise SystemExit(f"{args.output} has other settings: {found['settings']}, not {settings(args)}")
    return {comparison.num_shared: comparison for comparison in comparisons}


def compare(args: argparse.Namespace, who: list[Candidate], workload: Workload, into: Comparison) -> None:
    """Warms up, checks, and adds rounds."""
    is_exact = args.dtype == "float32"
    with tqdm(total=(args.rounds + 1) * len(who), unit="run", disable=None) as progress:

        def tick(name: str) -> None:
            progress.set_description(name)
            progress.update()

        measuring.play(who, workload.first(measuring.CHECKED), is_exact, False, tick)
        for _ in range(args.rounds):
            is_odd = bool(len(into.rounds) % 2)
            into.rounds.append(measuring.play(who, workload, is_exact, is_odd, tick))


def compare_all(args: argparse.Namespace, model: Any, found: dict[str, Any]) -> None:
    """A table for each workload, saved as soon as it is there."""
    who, comparisons = candidates(args, model), earlier(args)
    for num_shared in args.shared:
        workload = make_workload(args.requests, args.factor, model.config.vocab_size, num_shared, args.seed)
        described = {candidate.name: candidate.describe() for candidate in who}
        new = Comparison(workload.describe(), num_shared, workload.num_prompt_tokens, described)
        comparison = comparisons.setdefault(num_shared, new)
        comparison.candidates = described
        compare(args, who, workload, comparison)
        print(report.table(comparison))
        if args.output:
            report.save(args.output, found, list(comparisons.values()))


def take_apart(args: argparse.Namespace, model: Any, found: dict[str, Any]) -> None:
    """Where the time goes: of a decode step, and of serving the first workload."""
    workload = make_workload(args.requests, args.factor, model.config.vocab_size, args.shared[0], args.seed)
    served = ours.Ours(model, "sjf", args.room, limits(args))
    served.run(workload.first(measuring.CHECKED))
    num_steps = 20 if args.quick else profiling.STEPS
    profiles = [
        profiling.profile_decoding(model, args.profile, num_steps),
        profiling.profile_workload(served, workload),
    ]
    print(*map(profiling.describe, profiles), sep="\n")
    write(args.output, found | {"profiles": list(map(dataclasses.asdict, profiles))})


def endure(args: argparse.Namespace, model: Any, found: dict[str, Any]) -> None:
    """Exits with the problems, if there are any."""
    logging.getLogger("paged_cache").setLevel(logging.ERROR)  # it warns of each request that is rejected
    result = soak.soak(model, args.soak, args.seed)
    print(soak.describe(result))
    write(args.output, found | dataclasses.asdict(result))
    if result.problems:
        raise SystemExit("\n".join([f"{len(result.problems)} problems:", *result.problems[:20]]))


def write(output: Path | None, found: dict[str, Any]) -> None:
    """The JSON file."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and writes the JSON file."""
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    model = models.make_model(args.model, args.device, getattr(torch, args.dtype), args.seed)
    found = {"device": f"{args.device}, {platform.machine()}", "load": os.getloadavg()[0], **environment(args.seed)}
    found |= {"parameters": models.count_parameters(model), "settings": settings(args)}
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    if found["load"] > LOAD:
        print("WARNING: other jobs keep this machine busy.")
    (take_apart if args.profile else endure if args.soak else compare_all)(args, model, found)


if __name__ == "__main__":
    main()
