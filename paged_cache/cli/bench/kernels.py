"""`paged-cache bench kernels`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import finish
from .typed import picture_path, several, tick, typed


def kernels(
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is one")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Sections: decode, prefill, chunk, mixed, step, …")] = None,
    pattern: Annotated[str, typer.Option("--filter", help="A regular expression for the names of shapes.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, short: are the results right.")] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="--device cuda with small shapes, on the CPU.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Per shape.", show_default="0.4, quick and rehearsed 0.05")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds after which no shape is begun.", show_default="340, on CUDA 500"),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB for one shape.", show_default="what is free, on a CPU at most 6"),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="torch's own")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="CPU: layers in turn, so that caches do not help.")] = False,
    order: Annotated[
        str | None, typer.Option(help="Of a block's dimensions, NHD or HND.", show_default="the storage's own")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,…",
            help="Variants beside the usual: tile=32,64 of Triton's Config, or a constant, "
            "kernels.cpu.attention.SERIAL_BYTES=0. Repeatable.",
        ),
    ] = None,
    show: Annotated[Path | None, typer.Option(metavar="JSON", help="Tables and goals of an earlier run.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="A picture beside the JSON file.")] = False,
    seed: Annotated[int, typer.Option(help="Of tensors and block tables.")] = 0,
    output_json: Annotated[Path | None, typer.Option(help="Where results are written.")] = None,
) -> None:
    """Attention over blocks against what the machine can do, and against attention without blocks."""
    import torch

    from ...bench.kernels.benchmark import Options, chosen, run
    from ...bench.kernels.plot import draw
    from ...bench.results import Results

    picture = picture_path(plot, output_json or show)
    if show:
        found = Results.load(show)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        _check(device, rehearse, order, pattern)
        options = Options(
            *(device, tuple(several(only)), pattern, quick, rehearse, seconds, budget, memory, threads, cold, order),
            changes=[setting for text in ablate or [] for setting in _settings(text)],
            seed=seed,
        )
        if not chosen(options):
            raise typer.BadParameter(f"No shape is in the sections {several(only)} and has {pattern!r} in its name.")
        found = run(options, typed(), tick, lambda part: part.save(output_json) if output_json else None)
    finish(found, output_json)
    if picture:
        typer.echo(f"written: {draw(found, picture)}")


def _check(device: str, is_rehearsal: bool, order: str | None, pattern: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is {device!r}: it can be cpu or cuda.")
    if device == "cuda" and not is_rehearsal and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no CUDA device here; --rehearse runs it on the CPU.")
    if is_rehearsal and device != "cuda":
        raise typer.BadParameter("--rehearse is for --device cuda.")
    if order not in (None, "NHD", "HND"):
        raise typer.BadParameter(f"--order is {order!r}: it can be NHD or HND.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(f"--filter {pattern!r} is no regular expression: {error}.") from error


def _settings(text: str) -> list[tuple[str, Any]]:
    """`NAME=1,2` as settings."""
    name, _, values = text.partition("=")
    try:
        return [(name, int(value)) for value in values.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--ablate {text!r}: NAME=VALUE,… with whole numbers is wanted.") from error
