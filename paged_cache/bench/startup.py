"""`bench startup`: from the first import to the first token, in a fresh process each time.

Kernels for CPUs are compiled once and kept on the disk. So there are two cases: they are there, or all have to be compiled.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..assets import MODEL_PATH
from ..errors import PagedCacheError
from .measuring import Sample, Tick, measure
from .results import Goal, Results, environment

PLAIN, PAGED, BATCHER = "generate", "generate, PagedCache", "ContinuousBatcher"
SCRIPT = Path(__file__).with_name("first_token.py")
METRICS = ["startup_s", "import_s", "load_s", "first_token_s"]
WAYS = {PLAIN: "plain", PAGED: "paged", BATCHER: "batcher"}
PATIENCE = 300.0  # seconds for one process
TITLE = "From the first import to the first token, in a fresh process; with CPU kernels on the disk, and the very first start"
KERNELS, KEPT, COMPILED = "cpu_kernels", "on the disk", "compiled now"
GOALS = [
    Goal(f"{name}: at most 1.3 times plain generate", "startup_s", name, PLAIN, at_most=1.3, case={KERNELS: KEPT})
    for name in (PAGED, BATCHER)
]


class StartError(PagedCacheError):
    """A process ended without a token."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: A folder, an id on the hub, or "shipped".
        device, dtype: Of the model.
        rounds: That count; one more goes before, which fills the caches of the system and of compilers.
        threads: Of the CPU; None for torch's own.
        seed: For the record; nothing is random.
        prompt: Token ids.
    """

    model: str = "shipped"
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 5
    threads: int | None = None
    seed: int = 0
    prompt: Sequence[int] = (5, 6, 7, 8, 9, 10, 11, 12)


@dataclass(frozen=True)
class Start:
    """A candidate: one process, which finds compiled kernels or, where it is the very first, none."""

    name: str
    settings: Settings
    is_first: bool = False

    def run(self) -> Sample:
        """Waits for its first token.

        Raises:
            StartError: There is none.
        """
        options = {name: value for name, value in asdict(self.settings).items() if name not in ("rounds", "seed")}
        options["model"] = str(MODEL_PATH) if self.settings.model == "shipped" else self.settings.model
        # As text, not as a file: the folder of a script would be the first place where imports look.
        command = [sys.executable, "-c", SCRIPT.read_text(encoding="utf-8"), WAYS[self.name], json.dumps(options)]
        with tempfile.TemporaryDirectory() as empty:
            answer = _answer(command, {"NUMBA_CACHE_DIR": empty} if self.is_first else {})
        tokens = answer.pop("tokens")
        return Sample(tokens, {"startup_s": sum(answer.values()), **answer})


def run(settings: Settings, command: str = "", tick: Tick = lambda name: None) -> Results:
    """Processes one after the other, in turns; a single round of those that compile.

    Raises:
        StartError: A process of ours ended without a token.
        WrongAnswerError: One of ours has another first token.
    """
    found = Results(
        "startup",
        TITLE,
        command,
        environment(settings.seed, settings.device),
        asdict(settings),
        columns=METRICS,
        compared=["startup_s"],
        ours=[PAGED, BATCHER],
        goals=GOALS,
    )
    for kernels, rounds, warm_up in ((KEPT, settings.rounds, 1), (COMPILED, 1, 0)):
        starts = [Start(name, settings, is_first=kernels == COMPILED) for name in WAYS]
        case = {"model": settings.model, KERNELS: kernels}
        found.lines += measure(starts, [PAGED, BATCHER], case, rounds=rounds, warm_up=warm_up, tick=tick)
    return found


def _answer(command: list[str], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The last line that a process says."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env=_environment() | dict(variables or {}),
            cwd=Path.cwd(),
        )
    except subprocess.TimeoutExpired as error:
        raise StartError(f"no token within {PATIENCE:g} seconds") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise StartError(f"a process ended with code {done.returncode}: {lines[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _environment() -> dict[str, str]:
    """This package is found where it is here, whether it is installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
