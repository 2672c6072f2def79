"""What the scripts of this folder share: options, and what becomes of their results."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm

from paged_cache.bench.results import Results, environment
from paged_cache.bench.tables import show

FOLDER = Path(__file__).resolve().parent / "results"


def parser(doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """One with the options that all have; without `rounds` for what is counted, not timed."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    if rounds:
        made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=2, help="of the CPU")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="few and short: does it run, is it right")
    made.add_argument("--add", action="store_true", help="to the rounds that the JSON file has, of equal settings")
    made.add_argument("--output", type=Path, help="JSON file; by default in results/, with --quick none")
    return made


def parse(
    options: argparse.ArgumentParser, arguments: list[str] | None, script: str, quick: dict[str, Any]
) -> argparse.Namespace:
    """Reads options, and prepares torch.

    Args:
        options: What there is.
        arguments: What was typed; by default the program's own.
        script: Its `__file__`.
        quick: What `--quick` sets.

    Returns:
        With `command`, as it can be typed again, and `output`, None where nothing is to be written.
    """
    args = options.parse_args(arguments)
    typed = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    args.command = shlex.join(["python", f"benchmarks/{Path(script).name}", *typed])
    if args.quick:
        vars(args).update(quick)
    if args.add and args.quick and not args.output:
        options.error("--add with --quick: say with --output to which file")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def make_results(args: argparse.Namespace, name: str, title: str, settings: list[str], **parts: Any) -> Results:
    """Results without lines; to be called before anything is measured."""
    if not args.quick and not args.output:
        args.output = FOLDER / f"{name}.json"
    kept = {key: getattr(args, key) for key in (*settings, "threads", "seed")}
    return Results(name, title, args.command, environment(args.seed, getattr(args, "device", "cpu")), kept, **parts)


def progress(total: int) -> Any:
    """A bar; its `update` takes the place of `tick`."""
    return tqdm(total=total, unit="run", disable=None)


def finish(results: Results, args: argparse.Namespace) -> Results:
    """Adds earlier rounds where that is wanted, shows tables, and writes the JSON file."""
    if args.add and args.output.exists():
        results.add_to(Results.load(args.output))
    console = Console(highlight=False)
    show(results, console)
    if args.output:
        console.print(f"\nwritten: {results.save(args.output)}")
    return results
