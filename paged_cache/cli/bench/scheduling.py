"""`paged-cache bench scheduling`."""

from pathlib import Path
from typing import Annotated

import typer

from .shared import finish
from .typed import given, picture_path, several, tick, typed


def scheduling(
    workloads: Annotated[list[str] | None, typer.Option(help="Names of workloads.", show_default="all")] = None,
    loads: Annotated[
        str | None,
        typer.Option(
            help="Loads with memory for everything, with commas; 1 is all that FCFS gets done.",
            show_default="0.5,0.9,1,1.2; quick 1",
        ),
    ] = None,
    memory_loads: Annotated[
        str | None, typer.Option(help="Loads where the pool limits, with commas.", show_default="0.9,1.1; quick 1.1")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=20, help="Requests of a run.", show_default="1500; quick 200")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each, with a seed of its own.", show_default="3; quick 1")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first run.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    engine: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON file with per_step, per_token and per_kv in seconds.",
            show_default="an 8B model on a large GPU, guessed",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Run few requests of two workloads, but for what is given. Goals are not judged."),
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw a picture beside the JSON file.")] = False,
    output_json: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Who is served first, and what it is worth: the real scheduler in virtual time."""
    from ...bench.scheduling.benchmark import QUICK, Options, read_engine, run
    from ...bench.scheduling.plot import draw
    from ...bench.scheduling.workloads import WORKLOADS

    picture = picture_path(plot, output_json)
    names = several(workloads)
    if unknown := sorted(set(names) - set(WORKLOADS)):
        raise typer.BadParameter(f"There are no workloads {unknown}, only {WORKLOADS}.")
    own = given(workloads=names or None, count=num_prompts, seeds=rounds)
    own |= given(loads=_numbers(loads), memory_loads=_numbers(memory_loads))
    small = QUICK if quick else {}
    found = run(Options(seed=seed, engine=read_engine(slots, engine), jobs=jobs, **small | own), typed(), tick)
    finish(found, output_json, quick)
    if picture:
        typer.echo(f"written: {draw(found, picture)}")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: numbers with commas between them are wanted.") from error
    if min(numbers) <= 0:
        raise typer.BadParameter(f"{text!r}: loads are above 0.")
    return numbers
