"""Tables of results: for a terminal, and in Markdown."""

from rich.console import Console

from .results import Results


def show(results: Results, console: Console) -> None:
    """Prints what was found."""
    console.print(markdown(results))


def markdown(results: Results) -> str:
    """A table per benchmark."""
    rows = [f"{line.case} {line.candidate}: {line.metrics or line.note}" for line in results.lines]
    return "\n".join([results.title, *rows])
