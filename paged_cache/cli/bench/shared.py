"""What all benchmarks do with their results."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ...bench.results import Results


def finish(results: "Results", output_json: Path | None, quick: bool = False) -> None:
    """Shows the tables, and writes the JSON file if one is asked for.

    Goals and ratios are for runs in full: after a quick one they are neither judged nor written.
    """
    from rich.console import Console

    from ...bench.tables import show

    console = Console(highlight=False)
    if quick:
        results.goals, results.compared = [], []
        results.title += " (--quick: the figures say little)"
    show(results, console)
    if quick:
        console.print("--quick: the figures say little; nothing is compared or judged.", style="yellow")
    if output_json:
        console.print(f"\nwritten: {results.save(output_json)}")


def earlier(add: bool, output_json: Path | None) -> "Results | None":
    """What `--add` adds to; None if there is nothing yet.

    Raises:
        typer.BadParameter: There is no file to add to.
        NotResultsError: It is something else.
    """
    from ...bench.results import Results

    if add and output_json is None:
        raise typer.BadParameter("--add adds to the file of --output-json: give that, too.")
    return Results.load(output_json) if add and output_json and output_json.exists() else None
