"""What the default policy is to reach."""

from ..results import Goal
from .measuring import DEFAULT, FCFS, FIRST_FIT, FREE_SRPT, OTHER_BASELINE, RATIOS

LIMITS = [
    (1.0, "mean", "at_most", 0.70),
    (1.0, "p99", "at_most", 1.30),
    (1.0, "per_token", "at_most", 0.45),
    (1.0, "throughput", "at_least", 0.98),
    (0.9, "mean", "at_most", 0.80),
    (0.5, "mean", "at_most", 1.01),
]
NEAR_SRPT = 1.7


def goals() -> list[Goal]:
    """One per limit and baseline, and one for the distance from what no scheduler could do."""
    found = []
    for baseline, suffix in ((FCFS, ""), (FIRST_FIT, OTHER_BASELINE)):
        for load, metric, side, limit in LIMITS:
            text = f"load {load}: {metric} x {baseline}"
            case = {"section": "slots", "load": load}
            found.append(Goal(text, RATIOS[metric] + suffix, DEFAULT, **{side: limit}, case=case))  # type: ignore[arg-type]
    text, case = f"load 1.0: mean x {FREE_SRPT}", {"section": "slots", "load": 1.0}
    return [*found, Goal(text, RATIOS["mean"], DEFAULT, FREE_SRPT, at_most=NEAR_SRPT, case=case)]
