"""Requests that are all there at the beginning: who is through with them first, as `vllm bench throughput` asks."""

from collections.abc import Sequence
from typing import Any

from ...loading import quiet
from .. import models
from ..measuring import Tick
from ..results import Goal, Results, environment
from .comparing import PEERS, Settings, checked_by, compare, servers, torch_threads
from .datasets import Dataset
from .metrics import throughput_metrics
from .ours import OURS, PREPACKED

USUAL = ("loop", "padded", "generate_batch", "fcfs", "sjf", PREPACKED)
POSSIBLE = ("loop", "padded", "generate_batch", *OURS)
COLUMNS = [
    "elapsed_time",
    "output_throughput",
    "mean_e2el_ms",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "kv_allocated_bytes",
    "peak_kv_in_use_bytes",
    "cached_tokens",
    "num_preemptions",
]
FASTER = {"loop": 5.0, "padded": 3.0, "generate_batch": 2.5}
FASTER_SHARED = {"generate_batch": 3.5}  # with a shared prefix
VLLM_TIME, VLLM_TIME_STRETCH = 1.8, 1.0
SHARED = "shared_prefix_len"


def run(
    settings: Settings,
    dataset: Dataset,
    shared_prefix_len: Sequence[int] = (0, 256),
    *,
    earlier: Results | None = None,
    command: str = "",
    tick: Tick = lambda name: None,
) -> Results:
    """A case for each length of a shared prefix.

    Raises:
        InvalidRequestError: An option is wrong.
        OtherSettingsError: Rounds cannot be added to those of `earlier`. Nothing is measured.
        PeerError: An engine that was asked for does not start.
        WrongAnswerError: One of ours has other tokens than the reference.
    """
    names = settings.chosen(USUAL, POSSIBLE)
    tokenizer = models.load_tokenizer(settings.model) if dataset.needs_tokenizer else None
    with torch_threads(settings.threads), quiet():
        model = models.make_model(settings.model, settings.device, settings.torch_dtype, settings.seed)
        loads = [dataset.make(model.config.vocab_size, n, settings.seed, tokenizer) for n in shared_prefix_len]
        results = Results(
            "throughput",
            f"Throughput: {loads[0].describe()}{checked_by(settings, names)}",
            command,
            environment(settings.seed, settings.device),
            settings.for_json() | dataset.settings(),
            columns=COLUMNS,
            compared=["output_throughput"],
            ours=[name for name in names if name in OURS],
            goals=goals(settings, dataset, shared_prefix_len, names),
        )
        if earlier:
            results.add_to(earlier)
        with servers(settings, names, model, loads) as everybody:
            for num_shared, workload in zip(shared_prefix_len, loads, strict=True):
                case = {SHARED: num_shared}
                results.add(compare(everybody, case, workload, None, throughput_metrics, settings, tick))
            workloads = {f"{SHARED}={load.num_shared}": load.describe() for load in loads}
            described = {server.name: server.describe() for server in everybody}
            results.details = {"workloads": workloads, "candidates": described}
    return results


def goals(settings: Settings, dataset: Dataset, shared: Sequence[int], names: list[str]) -> list[Goal]:
    """For the trace; other lengths have other ratios, and tiny models none that mean anything."""
    if dataset.dataset_name != "trace" or settings.model == "tiny":
        return []
    found = []
    for ours in (name for name in names if name in OURS):
        for num_shared in shared:
            for peer, ratio in (FASTER | (FASTER_SHARED if num_shared else {})).items():
                options: dict[str, Any] = {"at_least": ratio, "case": {SHARED: num_shared}}
                text = f"{ours}: {ratio:g} times the output of {peer}, {num_shared} shared"
                found.append(Goal(text, "output_throughput", ours, peer, **options))
        for ratio in (VLLM_TIME, VLLM_TIME_STRETCH) if set(PEERS) & set(names) else ():
            text, is_stretch = f"{ours}: at most {ratio:g} times the time of vllm", ratio == VLLM_TIME_STRETCH
            found.append(Goal(text, "elapsed_time", ours, "vllm", at_most=ratio, is_stretch=is_stretch))
    return found
