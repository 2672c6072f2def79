"""What the numbers say, in sentences."""

from ..bench.metrics import Metric
from ..bench.results import Case, Results
from .caches import Dynamic, NoCache, Paged, Static
from .concurrency import OURS
from .measuring import BATCH, CONCURRENCY, CONTEXT, faults, part

PAGED, SERVED = Paged.name, OURS[0]


def findings(results: Results) -> list[str]:
    """For people, the most important first: tokens, memory, the price of a step, requests at once."""
    found = [_tokens(results)]
    for case in _ends(results, BATCH)[-1:]:
        found += _compared(results, case, "reserved_bytes", PAGED, [Static.name, Dynamic.name])
    for case in _ends(results, CONTEXT):
        found += _compared(results, case, "mean_tpot_ms", PAGED, [NoCache.name, Dynamic.name])
    for case in _ends(results, CONCURRENCY):
        found += _compared(results, case, "output_throughput", SERVED, part(results, CONCURRENCY).candidates())
    return found + [f"Left out: {what} ({why})." for what, why in results.details.get("left_out", {}).items()]


def _tokens(results: Results) -> str:
    if wrong := faults(results):
        return "NOT RIGHT: " + "; ".join(wrong)
    lines = [line for line in results.lines if line.candidate in results.ours]
    least = min(value for line in lines for value in line.metrics["identical_percent"])
    names = " and ".join(dict.fromkeys(line.candidate for line in lines))
    if least == 100:
        return f"All tokens of {names} are those of DynamicCache, unpadded and alone."
    return f"In {results.settings['dtype']}, {least:.0f} % or more of the rows of {names} are those of DynamicCache, alone."


def _ends(results: Results, key: str) -> list[Case]:
    """The smallest case of a part and the largest; one, or none, where there are no more."""
    cases = sorted(part(results, key).cases(), key=lambda case: float(case[key]))
    return cases[:1] + cases[1:][-1:]


def _compared(results: Results, case: Case, name: str, ours: str, peers: list[str]) -> list[str]:
    line, metric = results.line(case, ours), Metric(name)
    if line is None or name not in line.metrics:
        return []
    ratios = {peer: results.ratio(case, name, ours, peer) for peer in peers if peer != ours}
    words = [f"{metric.words(ratio.median)} than {peer}" for peer, ratio in ratios.items() if ratio]
    words = [metric.number(line.spread(name).median), *(text.replace("same than", "same as") for text in words)]
    ((key, value),) = case.items()
    return [f"{key.replace('_', ' ')} {value}, {metric.label}: {ours} {', '.join(words)}."]
