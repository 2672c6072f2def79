"""`bench gpu`: everything for a GPU in one go, in a given time. Each part is a command in a process of its own.

So a part that hangs, crashes or runs out of memory costs only itself, and is stopped when its time is over. Parts that
write their results as they go keep what they found until then.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidRequestError
from .measuring import Tick
from .report import write

START_UP = 20.0  # seconds of a part that imports, a model's weights and the last shape may take
LEAST = 5.0  # seconds that are worth beginning for
TAIL = 6
ENTRY = ["-m", "paged_cache"]
Runner = Callable[[list[str], float, Path], int | None]


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: Of its files.
        weight: Its part of the time, compared with others'.
        command: On a GPU, without what `arguments` adds.
        rehearsal: The same, small and on the CPU.
        has_budget: Whether it can be told how long it may take.
    """

    name: str
    weight: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...]
    has_model: bool = True
    has_budget: bool = False

    def arguments(self, model: str, seconds: float, folder: Path, is_rehearsal: bool) -> list[str]:
        """What follows `paged-cache`."""
        found = ["bench", *(self.rehearsal if is_rehearsal else self.command)]
        if self.has_budget:
            found += ["--budget", f"{max(LEAST, seconds - START_UP):.0f}"]
        if self.has_model:
            where = ["--device", "cpu"] if is_rehearsal else ["--device", "cuda", "--dtype", "bfloat16"]
            found += ["--model", model, *where]
        return [*found, "--output-json", str(folder / f"{self.name}.json")]


PARTS = (
    Part(
        "kernels_cuda",
        3.0,
        ("kernels", "--device", "cuda", "--seconds", "0.2"),
        ("kernels", "--device", "cuda", "--rehearse", "--quick", "--seconds", "0.001", "--only", "decode,mixed"),
        has_model=False,
        has_budget=True,
    ),
    Part(
        "latency_cuda",
        2.0,
        ("latency", "--input-len", "1024", "--batch-size", "8", "--num-iters", "3", "--num-iters-warmup", "1"),
        ("latency", "--quick"),
    ),
    Part(
        "decode_cuda",
        2.0,
        ("decode", "--batch-sizes", "1,8,32", "--contexts", "128,2048,8192", "--seconds", "1", "--no-compile"),
        ("decode", "--quick", "--no-compile"),
    ),
    Part(
        "throughput_cuda",
        2.5,
        ("throughput", "--only", "padded,generate_batch,fcfs,sjf", "--shared-prefix-len", "0", "--rounds", "1"),
        ("throughput", "--quick", "--only", "padded,fcfs"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a part: `problem` is empty if all went well; `has_results` whether there is a file nevertheless."""

    name: str
    seconds: float
    problem: str
    has_results: bool


def run(
    folder: Path,
    minutes: float,
    model: str | None = None,
    *,
    only: Sequence[str] = (),
    rehearse: bool = False,
    runner: Runner | None = None,
    tick: Tick = lambda name: None,
) -> list[Outcome]:
    """Runs parts one after the other; each gets its share of the time that is left. Then writes `report.md`.

    Args:
        folder: For a JSON file and a log per part. Files of earlier runs with these names are removed.
        minutes: For all of it.
        model: As for `models.make_model`; None for 8b, rehearsed tiny.
        only: Names of parts; empty for all.
        rehearse: Small and on the CPU.
        runner: Runs a command for at most so many seconds, its output goes to a file; returns the exit code, or None when
            the time was over.
        tick: Called with the name of each part.

    Raises:
        InvalidRequestError: There is no part of a name.
    """
    unknown = sorted(set(only) - {part.name for part in PARTS})
    if unknown:
        raise InvalidRequestError(f"there is no part {unknown[0]!r}, only {', '.join(part.name for part in PARTS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    usual = "tiny" if rehearse else "8b"
    parts = [part for part in PARTS if not only or part.name in only]
    end, outcomes = time.monotonic() + 60 * minutes, list[Outcome]()
    for number, part in enumerate(parts):
        (folder / f"{part.name}.json").unlink(missing_ok=True)
        share = part.weight / sum(other.weight for other in parts[number:])
        seconds = share * (end - time.monotonic())
        tick(f"{part.name}, {max(0.0, seconds):.0f} s at most")
        outcomes.append(_run_part(part, model or usual, seconds, folder, rehearse, runner or run_process))
    if any(outcome.has_results for outcome in outcomes):
        write(folder, folder / "report.md")
    return outcomes


def _run_part(part: Part, model: str, seconds: float, folder: Path, is_rehearsal: bool, runner: Runner) -> Outcome:
    if seconds < LEAST:
        return Outcome(part.name, 0.0, "not begun: the time is over", has_results=False)
    log, start = folder / f"{part.name}.log", time.monotonic()
    code = runner(part.arguments(model, seconds, folder, is_rehearsal), seconds, log)
    problem = "" if code == 0 else f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        problem = "\n  ".join([f"{problem}, {log}", *lines[-TAIL:]])
    return Outcome(part.name, time.monotonic() - start, problem, (folder / f"{part.name}.json").exists())


def run_process(arguments: list[str], seconds: float, log: Path) -> int | None:
    """The usual runner."""
    command = [sys.executable, *ENTRY, *arguments]
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
    return done.returncode
