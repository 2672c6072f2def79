"""`bench latency`: one batch of prompts of equal length, as `vllm bench latency` asks; by `generate` with each cache, and by batchers."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from .. import BlockPool, PagedCache, patch
from ..errors import InvalidRequestError
from . import models
from .measuring import Candidate, Sample, Tick, measure
from .results import Results, environment
from .serving.comparing import same_tokens, torch_threads
from .serving.metrics import percentile
from .serving.ours import Ours
from .serving.outcome import Server
from .serving.peers import GENERATE_BATCH, GenerateBatch, Stopwatch
from .workload import Workload

DYNAMIC, STATIC, PAGED, BATCHER = (
    "generate, DynamicCache",
    "generate, StaticCache",
    "generate, PagedCache",
    "ContinuousBatcher",
)
TRANSFORMERS_BATCHES = "generate_batch"
OURS = [PAGED, BATCHER]
COMPILED = f"{STATIC}, compiled"  # what `generate` does by itself on CUDA
PEERS = {"static": STATIC, "generate_batch": TRANSFORMERS_BATCHES}
PERCENTILES = (10, 25, 50, 75, 90, 99)
BLOCK_SIZES = {"cpu": 16, "cuda": 64}
TITLE = "Latency of one batch"
QUICK: dict[str, Any] = {"input_len": 8, "output_len": 8, "batch_size": 2, "num_iters": 2, "num_iters_warmup": 1}
"""Few short rounds."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        input_len, output_len, batch_size: Tokens per prompt, new tokens, prompts.
        num_iters, num_iters_warmup: Rounds with and without times.
        model: As for `models.make_model`.
        device, dtype: Of the model. Only in float32 are equal tokens demanded, elsewhere they are counted.
        threads: Of the CPU; None for torch's own.
        seed: Of weights and prompts.
        peers: Beside `DynamicCache`, names in `PEERS`; None for all that this version of transformers has.
    """

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    num_iters: int = 10
    num_iters_warmup: int = 2
    model: str = "28m"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    seed: int = 0
    peers: Sequence[str] | None = None

    def chosen(self) -> list[str]:
        """Names in `PEERS`.

        Raises:
            InvalidRequestError: There is none of this name, or not with this version of transformers.
        """
        known = [name for name in PEERS if name != TRANSFORMERS_BATCHES or GENERATE_BATCH]
        if unknown := sorted(set(self.peers or ()) - set(known)):
            raise InvalidRequestError(f"peer is {unknown[0]!r}: there are {', '.join(known)}.")
        return known if self.peers is None else list(self.peers)


@torch.no_grad()
def run(settings: Settings, command: str = "", tick: Tick = lambda name: None) -> Results:
    """One case; all candidates in turns.

    Raises:
        InvalidRequestError: There is no peer of a name, or the requests are longer than the model's positions.
        WrongAnswerError: One of ours has other tokens than `generate` with `DynamicCache`, in float32.
    """
    names = settings.chosen()
    with torch_threads(settings.threads):
        model = models.make_model(settings.model, settings.device, getattr(torch, settings.dtype), settings.seed)
        _require_positions(model, settings)
        found = Results(
            "latency",
            f"{TITLE}: {settings.batch_size} prompts of {settings.input_len} tokens, {settings.output_len} new ones each",
            command,
            environment(settings.seed, settings.device),
            asdict(settings),
            columns=["latency_s", "ttft_ms", "tpot_ms", "equal_percent"],
            compared=["latency_s", "ttft_ms", "tpot_ms"],
            ours=OURS,
        )
        case = {name: getattr(settings, name) for name in ("input_len", "output_len", "batch_size")}
        found.lines = measure(
            candidates(model, make_workload(settings, model.config.vocab_size), names),
            OURS,
            case,
            rounds=settings.num_iters,
            warm_up=settings.num_iters_warmup,
            check=same_tokens if settings.dtype == "float32" else lambda found, expected: None,
            tick=tick,
        )
    found.details = {line.candidate: as_vllm_says(line.metrics["latency_s"]) for line in found.lines if line.metrics}
    return found


def as_vllm_says(latencies: list[float]) -> dict[str, Any]:
    """The file that `vllm bench latency --output-json` writes; seconds."""
    percentiles = {str(percent): percentile(latencies, percent) for percent in PERCENTILES}
    return {"avg_latency": statistics.fmean(latencies), "latencies": latencies, "percentiles": percentiles}


def make_workload(settings: Settings, vocab_size: int) -> Workload:
    """Random prompts."""
    tokens = random.Random(settings.seed)
    prompts = [tokens.choices(range(1, vocab_size), k=settings.input_len) for _ in range(settings.batch_size)]
    return Workload(prompts, [settings.output_len] * settings.batch_size)


def candidates(model: Any, workload: Workload, peers: list[str]) -> list[Candidate]:
    """The reference first."""
    config, agreement = model.config, Agreement()
    static = StaticCache(config=config, max_cache_len=workload.max_tokens) if "static" in peers else None
    size = BLOCK_SIZES.get(model.device.type, 16)
    num_blocks = len(workload.prompts) * -(-workload.max_tokens // size)
    pool = BlockPool.for_model(model, num_blocks=num_blocks, block_size=size)
    batcher = Ours(model, "fcfs", room=1.25, block_size=size)
    found: list[Candidate] = [
        Generate(DYNAMIC, model, workload, lambda: nullcontext(DynamicCache(config=config)), agreement),
        Generate(PAGED, model, workload, lambda: _forgetful(pool), agreement),
        Serve(BATCHER, batcher, workload, agreement),
    ]
    if static is not None:
        name = COMPILED if model.device.type == "cuda" else STATIC
        found.append(Generate(name, model, workload, lambda: _emptied(static), agreement))
    if TRANSFORMERS_BATCHES in peers:
        found.append(Serve(TRANSFORMERS_BATCHES, GenerateBatch(model), workload, agreement))
    return found


class Agreement:
    """How many requests have the tokens of the first answer that it sees."""

    def __init__(self) -> None:
        self._expected: list[list[int]] = []

    def percent(self, tokens: list[list[int]]) -> float:
        """Of one answer."""
        self._expected = self._expected or tokens
        pairs = zip(tokens, self._expected, strict=True)
        return 100 * sum(found == expected for found, expected in pairs) / len(tokens)


@dataclass(frozen=True)
class Generate:
    """`model.generate` with a cache, which is made before the clock starts. On CUDA it compiles where the cache is static."""

    name: str
    model: Any
    workload: Workload
    make_cache: Callable[[], AbstractContextManager[Any]]
    agreement: Agreement

    def run(self) -> Sample:
        """One batch."""
        ids = torch.tensor(self.workload.prompts, device=self.model.device)
        watch, num_new = Stopwatch(), self.workload.num_new[0]
        with self.make_cache() as cache, patch(self.model) if isinstance(cache, PagedCache) else nullcontext():
            start = time.perf_counter()
            outputs = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                streamer=watch,
                max_new_tokens=num_new,
                do_sample=False,
            )
            tokens = outputs[:, ids.shape[1] :].tolist()  # waits for the device
            seconds = time.perf_counter() - start
        times = [moment - start for moment in watch.times[1:]]
        per_token = (times[-1] - times[0]) / max(1, num_new - 1)
        return _sample(tokens, seconds, times[0], per_token, self.agreement)


@dataclass(frozen=True)
class Serve:
    """A batcher with all prompts at once."""

    name: str
    server: Server
    workload: Workload
    agreement: Agreement

    def run(self) -> Sample:
        """One batch."""
        run = self.server.serve(self.workload)
        ttft, tpot = (statistics.fmean(getattr(x, name) for x in run.requests) for name in ("ttft", "tpot"))
        return _sample(run.tokens, run.seconds, ttft, tpot, self.agreement)


def _sample(tokens: list[list[int]], seconds: float, ttft: float, tpot: float, agreement: Agreement) -> Sample:
    times = {"latency_s": seconds, "ttft_ms": 1e3 * ttft, "tpot_ms": 1e3 * tpot}
    return Sample(tokens, times | {"equal_percent": agreement.percent(tokens)})


def _forgetful(pool: BlockPool) -> PagedCache:
    """On a pool that keeps prefixes, as by default, but none of an earlier round: prompts are the same in all rounds."""
    pool.clear_prefix_cache()
    return PagedCache(pool)


def _emptied(cache: StaticCache) -> AbstractContextManager[StaticCache]:
    """The same tensors again, so that what was compiled for them stays valid."""
    cache.reset()
    return nullcontext(cache)


def _require_positions(model: Any, settings: Settings) -> None:
    length, most = settings.input_len + settings.output_len, getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise InvalidRequestError(f"input_len + output_len is {length}: the model has {most} positions.")
