"""Tables, goals and the JSON file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .measuring import OURS, Comparison, Spread

GOALS = {"loop": 5.0, "padded": 3.0, "generate_batch": 2.5}
SHARED_GOALS = {"generate_batch": 3.5}  # with a shared prefix
HEAD = (
    f"{'':16}{'equal':>6} {'seconds':>20} {'tokens/s':>9} | {'latency mean':>12} {'p50':>6} {'p99':>6} | "
    f"{'TTFT mean':>9} {'p99':>6} | {'TPOT, ms':>8} | {'KV, MiB':>8} {'preempted':>9} {'prefix hits':>11}"
)


def table(comparison: Comparison) -> str:
    """All candidates of a workload, and how ours compare."""
    rows = [f"\n{comparison.line}; {len(comparison.rounds)} rounds: medians [least, most]", HEAD]
    rows += [_row(comparison, name) for name in comparison.candidates]
    return "\n".join([*rows, *ratios(comparison)])


def _row(comparison: Comparison, name: str) -> str:
    equal = f"{name:16}{comparison.equal(name):6}"
    if name not in comparison.names():
        return f"{equal} WRONG TOKENS: no times"

    def at(metric: str) -> float:
        return comparison.spread(name, metric).median

    preempted = comparison.rounds[-1][name]["num_preemptions"]
    hits = at("prefix_hits") / comparison.num_prompt_tokens
    return (
        f"{equal} {_spread(comparison.spread(name, 'seconds')):>20} {at('tokens_per_second'):9.1f} | "
        f"{at('latency_mean'):12.2f} {at('latency_p50'):6.2f} {at('latency_p99'):6.2f} | "
        f"{at('ttft_mean'):9.2f} {at('ttft_p99'):6.2f} | {1e3 * at('tpot_mean'):8.1f} | "
        f"{at('kv_bytes') / 2**20:8.1f} {'-' if preempted is None else preempted:>9} {hits:11.1%}"
    )


def ratios(comparison: Comparison) -> list[str]:
    """Tokens per second of ours over those of the others, and whether that is what was wanted."""
    goals = GOALS | (SHARED_GOALS if comparison.num_shared else {})
    names, lines = comparison.names(), []
    for name in (name for name in OURS if name in names):
        cells = []
        for other in (other for other in goals if other in names):
            ratio = comparison.ratio(name, other)
            verdict = "met" if ratio.median >= goals[other] else "MISSED"
            cells.append(f"{other} x{_spread(ratio)} (goal {goals[other]:g}: {verdict})")
        lines.append(f"{name} against " + ", ".join(cells))
    return lines


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.min:.2f}, {spread.max:.2f}]"


def save(output: Path, found: dict[str, Any], comparisons: list[Comparison]) -> None:
    """Everything that was measured, and what follows from it."""
    lines = []
    for comparison in comparisons:
        names = comparison.names()
        ours = [name for name in OURS if name in names]
        pairs = [(name, other) for name in ours for other in GOALS if other in names]
        follows = {f"{name} / {other}": asdict(comparison.ratio(name, other)) for name, other in pairs}
        lines.append(asdict(comparison) | {"tokens_per_second": follows})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found | {"workloads": lines}, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict[str, Any], list[Comparison]]:
    """The inverse of `save`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in found.pop("workloads")]
    return found, [Comparison(**line) for line in lines]
