"""Requests that come over time: how long each waits, as `vllm bench serve` asks."""

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ...loading import quiet
from .. import models
from ..measuring import Tick
from ..results import Results, environment
from .arrivals import make_pace
from .comparing import Settings, checked_by, compare, servers, torch_threads
from .datasets import Dataset
from .metrics import Wanted, serve_metrics
from .ours import OURS
from .outcome import Pace

POSSIBLE = ("loop", "generate_batch", *OURS)


@dataclass(frozen=True)
class Traffic:
    """How requests come, and what is asked about them.

    Attributes:
        request_rate, burstiness, max_concurrency: As for `make_pace`.
        shared_prefix_len: Tokens that all prompts start with.
        wanted: Numbers.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    shared_prefix_len: int = 0
    wanted: Wanted = field(default_factory=Wanted)

    def pace(self, count: int, seed: int) -> Pace:
        """The same for all candidates, from the seed."""
        return make_pace(count, self.request_rate, self.burstiness, self.max_concurrency, seed)

    def case(self) -> dict[str, Any]:
        """In results."""
        return {name: value for name, value in asdict(self).items() if name != "wanted"}

    def columns(self) -> list[str]:
        """In tables."""
        latencies = [f"{kind}_{name}_ms" for name in self.wanted.names for kind in ("mean", self._last)]
        goodput = ["request_goodput"] if self.wanted.goodput else []
        return ["duration", "request_throughput", *goodput, "output_throughput", *latencies, "max_concurrent_requests"]

    @property
    def _last(self) -> str:
        return f"p{self.wanted.percentiles[-1]:g}"


def run(
    settings: Settings,
    dataset: Dataset,
    traffic: Traffic,
    *,
    earlier: Results | None = None,
    command: str = "",
    tick: Tick = lambda name: None,
) -> Results:
    """One case.

    Raises:
        InvalidRequestError: An option is wrong.
        OtherSettingsError: Rounds cannot be added to those of `earlier`. Nothing is measured.
        PeerError: An engine that was asked for does not start.
        WrongAnswerError: One of ours has other tokens than the reference.
    """
    names = settings.chosen(POSSIBLE, POSSIBLE)
    pace = traffic.pace(dataset.num_prompts, settings.seed)
    tokenizer = models.load_tokenizer(settings.model) if dataset.needs_tokenizer else None
    read = partial(serve_metrics, wanted=traffic.wanted)
    with torch_threads(settings.threads), quiet():
        model = models.make_model(settings.model, settings.device, settings.torch_dtype, settings.seed)
        workload = dataset.make(model.config.vocab_size, traffic.shared_prefix_len, settings.seed, tokenizer)
        results = Results(
            "serve",
            f"Requests over time: {workload.describe()}{checked_by(settings, names)}",
            command,
            environment(settings.seed, settings.device),
            settings.for_json() | dataset.settings() | traffic.case() | {"wanted": asdict(traffic.wanted)},
            columns=traffic.columns(),
            compared=[f"mean_{name}_ms" for name in traffic.wanted.names if name in ("ttft", "tpot")],
            ours=[name for name in names if name in OURS],
        )
        if earlier:
            results.add_to(earlier)
        with servers(settings, names, model, [workload]) as everybody:
            results.add(compare(everybody, traffic.case(), workload, pace, read, settings, tick))
            described = {server.name: server.describe() for server in everybody}
            results.details = {"arrivals": pace.arrivals, "candidates": described}
    return results
