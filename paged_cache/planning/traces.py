"""Lengths of real requests."""

import csv
import math
from pathlib import Path

from ..bench.workload import TRACE
from ..errors import InvalidRequestError
from ..loading import expanded

AZURE = "azure"
"""Names the trace that the package has: conversations of 2023, 256 of them."""


def read_trace(trace: str | Path, scale: float = 1.0) -> list[tuple[int, int]]:
    """Prompt and output tokens of each request in a CSV file with the columns `prompt` and `output`.

    Args:
        trace: The file, or "azure".
        scale: By which all lengths are divided; no length becomes 0.

    Raises:
        InvalidRequestError: There is no such file, it has no requests or other columns, or a length is no positive number.
    """
    if not 0 < scale < math.inf:
        raise InvalidRequestError(
            f"the scale of the trace is {scale}; it divides lengths and has to be a number above 0."
        )
    path = TRACE if str(trace) == AZURE else expanded(trace)
    if not path.is_file():
        raise InvalidRequestError(
            f"there is no trace {trace}: give a CSV file with columns prompt and output, or {AZURE!r}."
        )
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        if not {"prompt", "output"} <= set(reader.fieldnames or ()):
            raise InvalidRequestError(f"{trace} has the columns {reader.fieldnames}; it needs prompt and output.")
        rows = [(_length(row["prompt"], path, n), _length(row["output"], path, n)) for n, row in enumerate(reader, 2)]
    if not rows:
        raise InvalidRequestError(f"{trace} has no requests, only a head line.")
    return [(max(1, round(prompt / scale)), max(1, round(output / scale))) for prompt, output in rows]


def usual_requests(most: int) -> tuple[list[tuple[int, int]], str]:
    """Lengths of the package's trace, divided so that the longest prompt and the longest output have `most` tokens at most, and what they are in words."""
    scale, requests = 1.0, read_trace(AZURE)
    while (width := sum(map(max, zip(*requests, strict=True)))) > max(most, 2):
        scale *= max(1.01, width / (most + 1))
        requests = read_trace(AZURE, scale)
    divided = f", lengths divided by {scale:.3g} to fit the context" if scale > 1 else ""
    prompt, output = (max(lengths) for lengths in zip(*requests, strict=True))
    return requests, (
        f"{len(requests)} conversations of a trace (Azure 2023, --trace azure{divided}): prompts of at most {prompt:,} tokens, "
        f"outputs of at most {output:,}"
    )


def _length(text: str | None, path: Path, line: int) -> int:
    if text is None or not text.strip().isdigit() or int(text) < 1:
        raise InvalidRequestError(
            f"line {line} of {path} has the length {text!r}; it has to be a positive whole number."
        )
    return int(text)
