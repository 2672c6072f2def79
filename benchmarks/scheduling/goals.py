"""What the default policy is to reach, and whether it does."""

from typing import Any, NamedTuple

from .measuring import DEFAULT, FCFS, FIRST_FIT, FREE_SRPT


class Goal(NamedTuple):
    """`metric` of the default as a ratio to `baseline` is at most `most`, or at least if `is_least`."""

    load: float
    metric: str
    limit: float
    is_least: bool = False


GOALS = [
    Goal(1.0, "mean", 0.70),
    Goal(1.0, "p99", 1.30),
    Goal(1.0, "per_token", 0.45),
    Goal(1.0, "throughput", 0.98, is_least=True),
    Goal(0.9, "mean", 0.80),
    Goal(0.5, "mean", 1.01),
]
NEAR_SRPT = 1.7


def judge(summaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per goal and baseline."""
    found = []
    for baseline in (FCFS, FIRST_FIT):
        own = {(line["load"], line["policy"]): line for line in summaries if line["baseline"] == baseline}
        for goal in GOALS:
            if line := own.get((goal.load, DEFAULT)):
                value = line[goal.metric]
                is_met = value >= goal.limit if goal.is_least else value <= goal.limit
                text = f"load {goal.load}: {goal.metric} x {baseline} {'>=' if goal.is_least else '<='} {goal.limit}"
                found.append({"goal": text, "value": value, "is_met": is_met})
    full = {line["policy"]: line["mean"] for line in summaries if line["load"] == 1.0 and line["baseline"] == FCFS}
    if FREE_SRPT in full:
        value = full[DEFAULT] / full[FREE_SRPT]
        text = f"load 1.0: mean x {FREE_SRPT} <= {NEAR_SRPT}"
        found.append({"goal": text, "value": value, "is_met": value <= NEAR_SRPT})
    return found
