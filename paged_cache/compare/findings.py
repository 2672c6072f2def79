"""What the numbers say, in sentences."""

from ..bench.metrics import Metric
from ..bench.results import Case, Results
from .caches import Dynamic, NoCache, Paged, Static
from .concurrency import OURS
from .measuring import BATCH, CONCURRENCY, CONTEXT, IDENTICAL, faults, part

PAGED, SERVED = Paged.name, OURS[0]
QUICK = "--quick: are the tokens right, and does everything run? Times and ratios of so few tokens say nothing."


def findings(results: Results) -> list[str]:
    """For people, the most important first: tokens, memory, the price of a step, requests at once."""
    found = [_tokens(results), *(_numbers(results) if not results.settings["is_quick"] else [QUICK])]
    return found + [f"Left out: {what} ({why})." for what, why in results.details.get("left_out", {}).items()]


def _numbers(results: Results) -> list[str]:
    found: list[str] = []
    for case in _ends(results, BATCH)[-1:]:
        found += _compared(results, case, "reserved_bytes", PAGED, [Static.name, Dynamic.name])
    for case in _ends(results, CONTEXT):
        found += _compared(results, case, "mean_tpot_ms", PAGED, [NoCache.name, Dynamic.name])
    for case in _ends(results, CONCURRENCY):
        peers = part(results, CONCURRENCY).candidates()
        for name in ("output_throughput", "kv_allocated_bytes", "peak_kv_in_use_bytes"):
            found += _compared(results, case, name, SERVED, peers, names_best=name == "output_throughput")
    return found


def _tokens(results: Results) -> str:
    if wrong := faults(results):
        return "NOT RIGHT: " + "; ".join(wrong)
    lines = [line for line in results.lines if line.candidate in results.ours]
    least = min(value for line in lines for value in line.metrics[IDENTICAL])
    names = " and ".join(dict.fromkeys(line.candidate for line in lines))
    if least == 100:
        return f"All tokens of {names} are those of DynamicCache, unpadded and alone."
    return f"In {results.settings['dtype']}, {least:.0f} % or more of the rows of {names} are those of DynamicCache, alone."


def _ends(results: Results, key: str) -> list[Case]:
    """The smallest case of a part and the largest; one, or none, where there are no more."""
    cases = sorted(part(results, key).cases(), key=lambda case: float(case[key]))
    return cases[:1] + cases[1:][-1:]


def _compared(
    results: Results, case: Case, name: str, ours: str, peers: list[str], names_best: bool = False
) -> list[str]:
    """One sentence: ours and the ratio to each peer, to the best one first where that is wanted; none without samples."""
    line, metric = results.line(case, ours), Metric(name)
    if line is None or name not in line.metrics:
        return []
    ratios = {peer: results.ratio(case, name, ours, peer) for peer in peers if peer != ours}
    words = {peer: _against(metric.verdict(ratio), peer) for peer, ratio in ratios.items() if ratio}
    best = _best(results, case, metric, list(words)) if names_best else ""
    parts = [f"{words.pop(best)}, the best of the others"] if best else []
    ((key, value),) = case.items()
    numbers = f"{ours} {metric.number(line.spread(name).median)}"
    return [f"{key.replace('_', ' ')} {value}, {metric.label}: {'; '.join([numbers, *parts, *words.values()])}."]


def _best(results: Results, case: Case, metric: Metric, peers: list[str]) -> str:
    medians = {peer: line.spread(metric.name).median for peer in peers if (line := results.line(case, peer))}
    return (max if metric.is_better_high else min)(medians, key=lambda peer: medians[peer], default="")


def _against(words: str, peer: str) -> str:
    """With the word that goes with it."""
    link = {"the same": "as", "no clear difference": "from"}.get(words, "than")
    return f"{words} {link} {peer}"
