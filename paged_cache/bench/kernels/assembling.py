"""Timings as results, and back."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..results import Results
from .candidates import PAGED, READ, Setting, variant
from .goals import add_goals
from .machines import Ceilings
from .timing import TIME, Timing

OURS = [PAGED, "write+paged"]
COLUMNS = [TIME, "gb_throughput", "bandwidth_percent", "gflop_throughput", "eager_us"]
TITLE = "Attention over blocks against what the machine can do, and against attention without blocks"
NOTES = {
    TIME: "a call, median of neighbouring rounds",
    "gb_throughput": "K and V once, GB/s",
    "bandwidth_percent": "of a plain read in turns with it (CPU, from 64 MiB on), else of the measured read (CPU) or copy (CUDA)",
    READ: "no attention: a sum over as many bytes",
    "dynamic": "writes the newest token too; compare it with write+paged",
}


def assemble(
    command: str,
    environment: dict[str, Any],
    settings: dict[str, Any],
    ceilings: Ceilings,
    timings: Sequence[Timing],
    changes: Sequence[Setting] = (),
) -> Results:
    """Everything that was found until now, judged."""
    kind = settings["device"]
    limit = ceilings.read if kind == "cpu" else ceilings.copy
    found = Results(
        f"kernels_{kind}",
        TITLE,
        command,
        environment,
        settings,
        columns=COLUMNS,
        compared=[TIME],
        ours=[*OURS, *map(variant, changes)],
        lines=[line for timing in timings for line in timing.lines(limit)],
        details={
            "ceilings": asdict(ceilings),
            "doubt": ceilings.doubt,
            "notes": NOTES,
            "shapes": {str(timing.shape): timing.to_json() for timing in timings},
        },
    )
    add_goals(found, kind, list(timings), ceilings)
    return found


def timings(found: Results) -> list[Timing]:
    """The inverse."""
    return [
        Timing.from_json(data, [line for line in found.lines if line.case["shape"] == name])
        for name, data in found.details["shapes"].items()
    ]
