"""Every benchmark, one after the other, each in a process of its own, and the report of what they found."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequestError


@dataclass(frozen=True)
class Run:
    """One call of a command.

    Attributes:
        name: Of the files it leaves.
        command: `paged-cache bench …`, without the options that all have.
        full: Further options where it need not be quick.
        has_peers: Whether vLLM takes part, where there is one.
        is_long: Whether it is left out where all is to be quick.
        needs_peers: Whether it is left out where there is no vLLM.
    """

    name: str
    command: tuple[str, ...]
    full: tuple[str, ...] = ()
    has_peers: bool = False
    is_long: bool = False
    needs_peers: bool = False


RUNS = (
    Run("startup", ("startup",)),
    Run("throughput", ("throughput",)),
    Run(
        "throughput_192",
        ("throughput", "--shared-prefix-len", "0"),
        ("--num-prompts", "192", "--rounds", "2"),
        is_long=True,
    ),
    Run(
        "throughput_vllm",
        ("throughput", "--shared-prefix-len", "0", "--only", "fcfs,sjf,prepacked"),
        ("--num-prompts", "48", "--rounds", "7"),
        has_peers=True,
        needs_peers=True,
    ),
    Run("serve", ("serve",), has_peers=True),
    Run("latency", ("latency",)),
    Run("decode_28m", ("decode", "--model", "28m")),
    Run("decode_shipped", ("decode", "--model", "shipped"), is_long=True),
    Run("decode_layers", ("decode", "--model", "layers"), ("--seconds", "3"), is_long=True),
    Run(
        "kernels_cpu",
        ("kernels", "--device", "cpu", "--plot"),
        ("--threads", "2", "--budget", "420", "--seconds", "0.2"),
    ),
    Run("scheduling", ("scheduling", "--plot")),
)
TAIL = 12
"""Lines of a failed one's output that are shown."""


def chosen(only: Sequence[str], is_quick: bool, has_peers: bool = False) -> list[Run]:
    """Those whose command or name is among `only`; all of them if it is empty.

    Long ones are not among them if it is to be quick, unless they are named, nor those that need vLLM if it is not there.

    Raises:
        InvalidRequestError: There is no such benchmark, or it needs vLLM.
    """
    names = {name for run in RUNS for name in (run.name, run.command[0])}
    unknown = sorted(set(only) - names)
    if unknown:
        raise InvalidRequestError(f"There is no benchmark {', '.join(unknown)}; there are {', '.join(sorted(names))}.")
    runs = [run for run in RUNS if not only or run.name in only or run.command[0] in only]
    if not has_peers:
        if named := [run.name for run in runs if run.needs_peers and run.name in only]:
            raise InvalidRequestError(f"{named[0]} needs vLLM: give --peer-python, of an environment that has it.")
        runs = [run for run in runs if not run.needs_peers]
    return [run for run in runs if not (is_quick and run.is_long) or run.name in only]


def arguments(run: Run, output_dir: Path, is_quick: bool, peer_python: Path | None) -> list[str]:
    """What follows `paged-cache`."""
    peers = ["--peer", "vllm", "--peer-python", str(peer_python)] if peer_python and run.has_peers else []
    if peers and is_quick:
        peers += ["--model", "28m"]  # vLLM refuses the head size of the tiny model that others take to be quick
    options = ["--quick"] if is_quick else list(run.full)
    return ["bench", *run.command, *options, *peers, "--output-json", str(output_dir / f"{run.name}.json")]


def run_all(
    runs: Sequence[Run], output_dir: Path, is_quick: bool, peer_python: Path | None, tick: Callable[[str], Any]
) -> dict[str, str]:
    """Runs them all, whatever becomes of each. JSON files appear one by one, logs beside them.

    Args:
        runs: In this order.
        output_dir: Is made. Files of an earlier run of the same name are removed, so that none passes for a new one.
        is_quick: Few samples; whether everything is right is checked all the same.
        peer_python: Interpreter of an environment with vLLM.
        tick: Called with the name of each before it begins.

    Returns:
        The end of the output of those that failed, by name.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    failed = {}
    for run in runs:
        tick(run.name)
        (output_dir / f"{run.name}.json").unlink(missing_ok=True)
        log = output_dir / f"{run.name}.log"
        command = [sys.executable, "-m", "paged_cache", *arguments(run, output_dir, is_quick, peer_python)]
        with log.open("w", encoding="utf-8") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            failed[run.name] = "\n".join([f"exit code {code}, {log}", *lines[-TAIL:]])
    return failed
