"""What all benchmarks do with their results."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...bench.results import Results


def finish(results: "Results", output_json: Path | None) -> None:
    """Shows the tables, and writes the JSON file if one is asked for."""
    from rich.console import Console

    from ...bench.tables import show

    console = Console(highlight=False)
    show(results, console)
    if output_json:
        console.print(f"\nwritten: {results.save(output_json)}")
