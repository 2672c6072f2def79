"""Tables for people, and what the numbers depend on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from .candidates import OPPONENT, PAGED, READ
from .machines import Ceilings
from .measuring import Result, Spread

LIBRARIES = ("torch", "transformers", "triton", "numba", "paged-cache")
HEAD = (
    "us: median [quartiles] of a call; K and V in MiB and GB/s, % of the {limit} bandwidth (on a CPU from 64 MiB on: of a\n"
    "plain read in turns with it); GFLOP/s; then each peer's time\n"
    "and how many times as fast ours was [quartiles of the rounds]. 'dynamic' writes too, and so do we where it is compared."
)


def environment(seed: int) -> dict[str, Any]:
    """Versions and commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    return {"versions": _versions(), "python": platform.python_version(), "commit": commit or None, "seed": seed}


def _versions() -> dict[str, str]:
    installed = {name: list(importlib.metadata.distributions(name=name)) for name in LIBRARIES}
    return {name: found[0].version if found else "none" for name, found in installed.items()}


def ceilings(found: Ceilings) -> str:
    """A line; a reduction that is not much faster in the cache does not show what memory can do."""
    products = ", ".join(f"{name} {value:,.0f}" for name, value in found.gflops.items())
    text = f"ceilings: read {found.read:.1f} GB/s ({found.cached:.0f} from the cache), copy {found.copy:.1f} GB/s"
    doubt = "" if found.cached > 1.3 * found.read else "\nWARNING: the reduction may be the limit, not the memory."
    return f"{text}, matrix product GFLOP/s: {products}{doubt}"


def row(result: Result, bandwidth: float) -> str:
    """One line of the table."""
    name = f"{result.shape!s:52} {result.kv_bytes / 2**20:8.1f}"
    if not result.times:
        return f"{name} | left out: {result.missing.get(PAGED, 'no times')}"
    share = 100 * (result.ratios[READ].median if READ in result.ratios else result.bandwidth / bandwidth)
    cells = [
        f"{name} | {PAGED} {_times(result.times[PAGED])} {result.bandwidth:7.1f} {share:3.0f} % {result.gflops:7.0f}"
    ]
    for peer, ratio in ((peer, ratio) for peer, ratio in result.ratios.items() if peer != READ):
        ours = OPPONENT.get(peer, PAGED)
        versus = "" if ours == PAGED else f" to {ours} {result.times[ours].median:.4g}"
        cells.append(f"{peer} {result.times[peer].median:.4g}{versus} {_ratios(ratio)}")
    if result.eager:
        cells.append("eager " + ", ".join(f"{peer} {value:.4g}" for peer, value in result.eager.items()))
    cells += [f"{peer}: {why}" for peer, why in result.missing.items()]
    return " | ".join(cells)


def _times(spread: Spread) -> str:
    return f"{spread.median:8.4g} [{spread.quartile_1:.4g}, {spread.quartile_3:.4g}]"


def _ratios(spread: Spread) -> str:
    return f"x{spread.median:.2f} [{spread.quartile_1:.2f}, {spread.quartile_3:.2f}]"
