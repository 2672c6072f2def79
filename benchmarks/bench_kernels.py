"""Attention over blocks against what the machine can do, and against attention without blocks.

    python benchmarks/bench_kernels.py --device cpu --plot
    python benchmarks/bench_kernels.py --device cuda --only decode prefill

First the ceilings: a plain read of a large tensor, a copy, a matrix product. Then every shape, on blocks in runs of
random lengths, 16 on average unless the line says otherwise: this package's kernels and their peers (SDPA on dense K and V,
`DynamicCache`, gather and SDPA, torch's varlen attention) are checked against the reference and timed in turns. On CUDA
the times are those of graph replays over layers that are together at least four times as large as the L2 cache; on a CPU
an untimed call goes first unless `--cold` is given.
The package `roofline` beside this file has the parts.
"""

import argparse
import dataclasses
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paged_cache.memory import storage
from roofline import goals, plot, report
from roofline.candidates import Setting
from roofline.machines import Ceilings, Cpu, Cuda, Machine, Rehearsal
from roofline.measuring import Result, measure
from roofline.shapes import Shape, cpu_shapes, cuda_shapes, shrink

RESULTS = Path(__file__).resolve().parent / "results"
LOAD = 1.5


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION", help="decode, prefill, chunk, mixed, step, scattered, ragged, …"
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help="of the names of lines")
    parser.add_argument("--quick", action="store_true", help="few lines, short: does it run, are the results right")
    parser.add_argument("--rehearse", action="store_true", help="--device cuda with small shapes, on the CPU")
    parser.add_argument("--seconds", type=float, help="per line; 0.4 by default")
    parser.add_argument("--budget", type=float, help="seconds after which no line is begun; 340 on a CPU, 500 on CUDA")
    parser.add_argument("--memory", type=float, help="GiB for one line; by default what is free, on a CPU 6 at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--cold", action="store_true", help="CPU: layers in turn, so that caches do not help")
    parser.add_argument("--order", choices=["NHD", "HND"], help="of a block's dimensions; by default the storage's own")
    parser.add_argument(
        "--ablate",
        nargs="+",
        default=[],
        type=_settings,
        metavar="NAME=VALUE,…",
        help="variants beside the usual: tile=32,64 of Triton's Config, or a constant, kernels.cpu.attention.SERIAL_BYTES=0",
    )
    parser.add_argument("--plot", action="store_true", help="a picture beside the JSON file")
    parser.add_argument("--show", type=Path, metavar="JSON", help="tables, goals and picture of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="JSON file; by default in results/, with --quick nothing is written"
    )
    args = parser.parse_args(arguments)
    args.settings = list(itertools.chain(*args.ablate))
    args.rehearse = args.rehearse and args.device == "cuda"
    args.budget = args.budget or (340 if args.device == "cpu" else 500)
    args.seconds = args.seconds or (0.05 if args.quick or args.rehearse else 0.4)
    if args.output is None and not (args.quick or args.rehearse or args.show):
        args.output = RESULTS / f"kernels_{args.device}.json"
    return args


def _settings(text: str) -> list[Setting]:
    """`NAME=1,2` as settings."""
    name, _, values = text.partition("=")
    return [(name, int(value)) for value in values.split(",")]


def chosen(args: argparse.Namespace) -> list[Shape]:
    """The shapes that the options ask for."""
    shapes = cuda_shapes(args.quick) if args.device == "cuda" else cpu_shapes(args.quick)
    wanted = [
        shape
        for shape in shapes
        if shape.section in (args.only or [shape.section]) and re.search(args.filter, str(shape))
    ]
    return [shrink(shape) for shape in wanted] if args.rehearse else wanted


def run(args: argparse.Namespace, machine: Machine, found: dict[str, Any]) -> None:
    """Measures what the options ask for into `found`; prints each line when it is there."""
    scale = 64 if args.rehearse else 8 if args.quick else 1
    ceilings = machine.ceilings(scale)
    found["ceilings"] = dataclasses.asdict(ceilings)
    print(report.ceilings(ceilings))
    limit = "read" if args.device == "cpu" else "copy"
    print(report.HEAD.format(limit=limit))
    deadline, lines = time.perf_counter() + args.budget, found.setdefault("lines", [])
    for shape in tqdm(shapes := chosen(args), unit="line", disable=None):
        if time.perf_counter() > deadline:
            print(f"{len(shapes) - len(lines)} lines are left out: {args.budget:g} seconds are over (--budget)")
            break
        room = int(args.memory * 2**30) if args.memory else machine.free_bytes()
        room = min(room, 6 * 2**30) if machine.device == "cpu" and not args.memory else room
        result = measure(machine, shape, args.settings, args.seconds, room)
        lines.append(result.to_json())
        if args.output:
            save(found, args.output)  # whatever happens then
        tqdm.write(report.row(result, getattr(ceilings, limit)))


def conclude(found: dict[str, Any], output: Path | None, has_plot: bool) -> None:
    """Goals, JSON file and picture."""
    results, ceilings = [Result.from_json(line) for line in found["lines"]], Ceilings(**found["ceilings"])
    verdicts = goals.judge(found["kind"], results, ceilings)
    print("\nGoals:", *verdicts, sep="\n")
    found["goals"] = [verdict.to_json() for verdict in verdicts]
    if output:
        save(found, output)
        if has_plot:
            print(plot.draw(results, ceilings, found, output.with_suffix(".png")))


def save(found: dict[str, Any], output: Path) -> None:
    """The JSON file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measures, or shows what was measured."""
    args = parse(arguments)
    if args.show:
        found = json.loads(args.show.read_text(encoding="utf-8"))
        ceilings = Ceilings(**found["ceilings"])
        bandwidth = ceilings.read if found["kind"] == "cpu" else ceilings.copy
        print(*(report.row(Result.from_json(line), bandwidth) for line in found["lines"]), sep="\n")
        conclude(found, args.output or args.show, args.plot)
        return
    torch.manual_seed(args.seed)
    machine: Machine = (
        Cpu(args.threads, args.cold) if args.device == "cpu" else Rehearsal() if args.rehearse else Cuda()
    )
    if args.order:
        storage.ORDERS[machine.device] = args.order
    found = {"kind": args.device, **machine.describe(), **report.environment(args.seed), "settings": vars(args) | {}}
    found["settings"] = {name: str(value) for name, value in found["settings"].items()}
    print(*(f"{name}: {value}" for name, value in found.items() if name != "settings"), sep="\n")
    if found.get("load", 0) > LOAD:
        print("WARNING: other jobs keep this machine busy.")
    run(args, machine, found)
    conclude(found, args.output, args.plot)


if __name__ == "__main__":
    main()
