"""Numbers of a run, under the names that `vllm bench` has for them."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...errors import InvalidRequestError
from ..workload import Workload
from .outcome import Run, Served

Metrics = dict[str, float]
BY_REQUEST: dict[str, Callable[[list[Served]], list[float]]] = {
    "ttft": lambda requests: [request.ttft for request in requests],
    "tpot": lambda requests: [request.tpot for request in requests if len(request.tokens) > 1],
    "itl": lambda requests: [gap for request in requests for gap in request.gaps],
    "e2el": lambda requests: [request.latency for request in requests],
}
GOOD: dict[str, Callable[[Served], float]] = {
    "ttft": lambda request: request.ttft,
    "tpot": lambda request: request.tpot,
    "e2el": lambda request: request.latency,
}


@dataclass(frozen=True)
class Wanted:
    """Which numbers of a run are wanted.

    Attributes:
        names: Of `BY_REQUEST`: those with mean, median, standard deviation and percentiles.
        percentiles: In percent.
        goodput: Most milliseconds by name, for a request to be a good one; empty: nobody asks.
    """

    names: tuple[str, ...] = tuple(BY_REQUEST)
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, names: str, percentiles: str, goodput: list[str]) -> "Wanted":
        """From the options of `vllm bench serve`: "ttft,tpot", "50,99", ["ttft:200", "tpot:50"].

        Raises:
            InvalidRequestError: A name is unknown, or a number is none.
        """
        chosen = tuple(name.strip() for name in names.split(","))
        if unknown := set(chosen) - BY_REQUEST.keys():
            raise InvalidRequestError(f"percentile_metrics {sorted(unknown)}: there are {', '.join(BY_REQUEST)}.")
        percents = tuple(_number("metric_percentiles", text) for text in percentiles.split(","))
        if wrong := [percent for percent in percents if not 0 <= percent <= 100]:
            raise InvalidRequestError(f"metric_percentiles {wrong}: percentiles lie between 0 and 100.")
        return cls(chosen, percents, dict(_objective(text) for text in goodput))


def throughput_metrics(run: Run, workload: Workload) -> Metrics:
    """Those of `vllm bench throughput`, and the latencies behind them."""
    count, total = len(run.requests), workload.num_prompt_tokens + run.num_tokens
    return {
        "elapsed_time": run.seconds,
        "num_requests": count,
        "total_num_tokens": total,
        "requests_per_second": count / run.seconds,
        "tokens_per_second": total / run.seconds,
        "output_throughput": run.num_tokens / run.seconds,
        **latencies(run.requests, Wanted(("ttft", "tpot", "e2el"))),
        **_memory(run),
    }


def serve_metrics(run: Run, workload: Workload, wanted: Wanted) -> Metrics:
    """Those of `vllm bench serve`."""
    count, tokens = len(run.requests), run.num_tokens
    good = {"request_goodput": num_good(run.requests, wanted.goodput) / run.seconds} if wanted.goodput else {}
    return {
        "duration": run.seconds,
        "completed": count,
        "failed": 0,  # a request that fails is an error of its candidate
        "total_input_tokens": workload.num_prompt_tokens,
        "total_output_tokens": tokens,
        "request_throughput": count / run.seconds,
        **good,
        "output_throughput": tokens / run.seconds,
        "total_token_throughput": (workload.num_prompt_tokens + tokens) / run.seconds,
        "max_output_tokens_per_s": _busiest_second(run.requests),
        "max_concurrent_requests": max_concurrent(run.requests),
        **latencies(run.requests, wanted),
        **_memory(run),
    }


def latencies(requests: list[Served], wanted: Wanted) -> Metrics:
    """Mean, median, standard deviation and percentiles, in milliseconds; 0 where no request has the number."""
    found: Metrics = {}
    for name in wanted.names:
        values = [1e3 * value for value in BY_REQUEST[name](requests)] or [0.0]
        found[f"mean_{name}_ms"] = statistics.fmean(values)
        found[f"median_{name}_ms"] = statistics.median(values)
        found[f"std_{name}_ms"] = statistics.pstdev(values)
        found |= {f"p{percent:g}_{name}_ms": percentile(values, percent) for percent in wanted.percentiles}
    return found


def percentile(values: list[float], percent: float) -> float:
    """Between the nearest values."""
    ordered, place = sorted(values), (len(values) - 1) * percent / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place % 1)


def num_good(requests: list[Served], goodput: Mapping[str, float]) -> int:
    """Requests that meet all objectives, which are in milliseconds."""
    return sum(all(1e3 * GOOD[name](request) <= most for name, most in goodput.items()) for request in requests)


def max_concurrent(requests: list[Served]) -> int:
    """Most requests between their arrival and their last token at a time."""
    changes = [(request.arrival, 1) for request in requests] + [(request.times[-1], -1) for request in requests]
    under_way = most = 0
    for _, change in sorted(changes):
        under_way += change
        most = max(most, under_way)
    return most


def _busiest_second(requests: list[Served]) -> int:
    return max(Counter(int(moment) for request in requests for moment in request.times).values())


def _memory(run: Run) -> Metrics:
    maybe = {"peak_kv_in_use_bytes": run.kv_in_use, "num_preemptions": run.num_preemptions}
    known = {name: value for name, value in maybe.items() if value is not None}
    return {"kv_allocated_bytes": run.kv_allocated, "cached_tokens": run.cached_tokens, **known}


def _objective(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOOD:
        raise InvalidRequestError(f"goodput {text!r}: it is name:milliseconds, with one of {', '.join(GOOD)}.")
    most = _number(f"goodput {name}", limit)
    if not most >= 0:
        raise InvalidRequestError(f"goodput {text!r}: milliseconds are a number, and not negative.")
    return name, most


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRequestError(f"{option} {text!r} is no number.") from error
