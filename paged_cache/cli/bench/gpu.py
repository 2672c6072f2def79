"""`paged-cache bench gpu`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import readable_errors
from .typed import several, tick

NO_GPU = 2


def gpu(
    output_dir: Annotated[Path, typer.Option(help="Folder for a JSON file per part, logs and the report.")] = Path(
        "out/gpu"
    ),
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes for all of it; what does not fit is stopped.")] = 8.0,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model: 8b, 28m or tiny (random weights), an id on the hub, or a folder.",
            show_default="8b; rehearsed tiny",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Parts to run: kernels_cuda, latency_cuda, decode_cuda, throughput_cuda.")
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Run all of it small, on the CPU.")] = False,
) -> None:
    """Everything for a GPU: kernels against the copy bandwidth, decode, latency and throughput against transformers."""
    import torch

    from ...bench.gpu import run

    if not rehearse and not torch.cuda.is_available():
        typer.echo("paged-cache: torch sees no CUDA device here; --rehearse runs all of it small on the CPU.", err=True)
        raise typer.Exit(NO_GPU)
    with readable_errors():
        outcomes = run(output_dir, minutes, model, only=several(only), rehearse=rehearse, tick=tick)
    for one in outcomes:
        results = "results" if one.has_results else "no results"
        typer.echo(f"{one.name}: {one.seconds:.0f} s, {results}{', ' + one.problem if one.problem else ''}")
    if any(one.has_results for one in outcomes):
        typer.echo(f"written: {output_dir / 'report.md'}")
    raise typer.Exit(0 if all(one.has_results for one in outcomes) else 1)
