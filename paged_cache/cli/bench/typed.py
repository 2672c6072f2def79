"""What commands say about themselves: what was typed, and how far they are."""

import sys
from pathlib import Path

import typer


def typed() -> str:
    """The command line, as it can be typed again."""
    return " ".join(["paged-cache", *sys.argv[1:]])


def tick(name: str) -> None:
    """A line on standard error before something is measured."""
    typer.echo(f"measuring {name}", err=True)


def several(texts: list[str] | None) -> list[str]:
    """An option that may be given several times, or once with commas."""
    return [part for text in texts or [] for part in text.split(",") if part]


def picture_path(is_wanted: bool, output_json: Path | None) -> Path | None:
    """Beside the JSON file.

    Raises:
        typer.BadParameter: There is none.
    """
    if is_wanted and output_json is None:
        raise typer.BadParameter("--plot writes its picture beside the JSON file: give --output-json too.")
    return output_json.with_suffix(".png") if is_wanted and output_json else None
