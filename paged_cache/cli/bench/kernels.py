"""`paged-cache bench kernels`."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import finish
from .typed import picture_path, several, tick, typed

_Device = Annotated[
    str | None, typer.Option(help="Device to measure: cpu or cuda.", show_default="cuda where there is one")
]
_Only = Annotated[list[str] | None, typer.Option(help="Sections to measure: decode, prefill, chunk, mixed, step, …")]
_Quick = Annotated[
    bool, typer.Option("--quick", help="Run few shapes, shortly: are the results right? Goals are not judged.")
]
_Rehearse = Annotated[
    bool, typer.Option("--rehearse", help="Run what --device cuda would, with small shapes on the CPU.")
]
_Seconds = Annotated[
    float | None, typer.Option(min=0, help="Seconds for each shape.", show_default="0.4, quick and rehearsed 0.05")
]
_Budget = Annotated[
    float | None,
    typer.Option(min=1, help="Seconds after which no shape is begun.", show_default="340, on CUDA 500"),
]
_Memory = Annotated[
    float | None,
    typer.Option(min=0.001, help="Memory for one shape, in GiB.", show_default="what is free, on a CPU at most 6"),
]
_Cold = Annotated[bool, typer.Option("--cold", help="Take layers in turn, so that caches of the CPU do not help.")]
_Order = Annotated[
    str | None, typer.Option(help="Order of a block's dimensions: NHD or HND.", show_default="the storage's own")
]
_Ablate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE,…",
        help="Variants beside the usual: tile=32,64 of Triton's Config, or a constant, "
        "kernels.cpu.attention.SERIAL_BYTES=0. Repeatable.",
    ),
]
_Show = Annotated[
    Path | None, typer.Option(metavar="JSON", help="Show tables and goals of an earlier run, and measure nothing.")
]


def kernels(
    device: _Device = None,
    only: _Only = None,
    pattern: Annotated[str, typer.Option("--filter", help="Regular expression that names of shapes must have.")] = "",
    quick: _Quick = False,
    rehearse: _Rehearse = False,
    seconds: _Seconds = None,
    budget: _Budget = None,
    memory: _Memory = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.", show_default="torch's own")] = None,
    cold: _Cold = False,
    order: _Order = None,
    ablate: _Ablate = None,
    show: _Show = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw a picture beside the JSON file.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of tensors and block tables.")] = 0,
    output_json: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
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
    finish(found, output_json, quick and not show)
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
