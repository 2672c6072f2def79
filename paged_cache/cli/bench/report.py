"""`paged-cache bench report` and `paged-cache bench all`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import readable_errors
from .typed import several


def report(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder with JSON files that --output-json wrote.")
    ] = Path("out/bench"),
    output: Annotated[
        Path | None,
        typer.Option(help="Markdown file for the report; pictures go beside it.", show_default="report.md in FOLDER"),
    ] = None,
) -> None:
    """One report of all results in a folder: goals, tables, pictures."""
    from ...bench.report import write

    with readable_errors():
        typer.echo(f"written: {write(folder, output or folder / 'report.md')}")


def all_(
    quick: Annotated[
        bool, typer.Option("--quick", help="Take few samples and check everything: minutes. Goals are not judged.")
    ] = False,
    output_dir: Annotated[Path, typer.Option(help="Folder for JSON files, logs and the report.")] = Path("out/bench"),
    report_path: Annotated[
        Path | None,
        typer.Option("--report", help="Markdown file for the report.", show_default="report.md in the output dir"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Names of benchmarks, repeatable or with commas.", show_default="all")
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Python of an environment with vLLM.")
    ] = None,
) -> None:
    """Every benchmark, then the report. Goes on when one fails; exit code 1 in the end."""
    from ...bench.suite import chosen, run_all

    with readable_errors():
        runs = chosen(several(only), quick, peer_python is not None)
        with _progress(len(runs)) as tick:
            failed = run_all(runs, output_dir, quick, peer_python, tick)
        for name, text in failed.items():
            typer.echo(f"\n{name} failed: {text}", err=True)
        if len(failed) < len(runs):
            report(output_dir, report_path or output_dir / "report.md")
    if failed:
        typer.echo(f"\nfailed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """What says which of `total` benchmarks begins: a line that moves, or in a file a line for each."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        begun: list[str] = []

        def tick(name: str) -> None:
            progress.update(task, description=name, completed=len(begun))
            begun.append(name)
            if not progress.console.is_terminal:
                progress.console.print(f"{len(begun)}/{total} {name}")

        yield tick
        progress.update(task, completed=total)
