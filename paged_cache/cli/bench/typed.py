"""What commands say about themselves: what was typed, and how far they are."""

import sys
from pathlib import Path
from typing import Any

import typer

DTYPES = ("float32", "bfloat16", "float16")


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


def given(**options: Any) -> dict[str, Any]:
    """Options that were typed; the others are None."""
    return {name: value for name, value in options.items() if value is not None}


def numbers(text: str) -> list[int]:
    """`1,8,32`.

    Raises:
        typer.BadParameter: Something else, or not above 0.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: whole numbers with commas between them are wanted.") from error
    if min(found) < 1:
        raise typer.BadParameter(f"{text!r}: all of them have to be above 0.")
    return found


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, str]:
    """What is asked for, or what this machine is best at.

    Raises:
        typer.BadParameter: There is no such thing here.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device is {device!r}: it can be cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {device}: torch sees no CUDA device here.")
    dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is {dtype!r}: it can be {', '.join(DTYPES)}.")
    return device, dtype
