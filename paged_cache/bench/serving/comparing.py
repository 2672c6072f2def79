"""Who serves the requests, with which model, and whether all of them give the same tokens."""

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InvalidRequestError
from .. import models
from ..measuring import Sample, Tick, Wrong, measure
from ..results import Case, Line
from ..workload import Workload
from .metrics import Metrics
from .ours import OURS, PREPACKED, Ours
from .outcome import Pace, Run, Server
from .peers import GENERATE_BATCH, GenerateBatch, Loop, Padded
from .vllm_peer import Vllm

CHECKED = 8  # requests of the round that warms up
LIMITS = {"cpu": {"max_num_seqs": 64, "max_num_batched_tokens": 1024}}  # elsewhere the batcher's own
PEERS = ("vllm",)


@dataclass(frozen=True)
class Settings:
    """Of a comparison.

    Attributes:
        model: As for `models.make_model`.
        device, dtype: Of the model. Only in float32 are equal tokens demanded, elsewhere they are counted.
        threads: Of the CPU; None for torch's own.
        seed: Of weights, tokens and arrivals.
        rounds: That are timed.
        only: Candidates; the first one is the reference, or if it is ours, in float32, a loop that is not timed. Empty for
            all.
        max_num_seqs, max_num_batched_tokens: Of this package's batcher; None for 64 and 1024 on a CPU, its own elsewhere.
        room: Size of the pool, of what all requests need at once.
        padded_size: Requests in a padded batch.
        peers: Of `PEERS`: engines in environments of their own.
        peer_python: Their interpreter.
    """

    model: str = "28m"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    seed: int = 0
    rounds: int = 3
    only: tuple[str, ...] = ()
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    room: float = 1.0
    padded_size: int = 8
    peers: tuple[str, ...] = ()
    peer_python: Path = Path(sys.executable)

    def __post_init__(self) -> None:
        """Checks what no command line could.

        Raises:
            InvalidRequestError: The pool would have no room.
        """
        if not 0 < self.room < math.inf:
            raise InvalidRequestError(
                f"room is {self.room:g}; it has to be above 0: 1 is what all requests need at once."
            )

    def chosen(self, usual: Sequence[str], possible: Sequence[str]) -> list[str]:
        """Names of the candidates.

        Raises:
            InvalidRequestError: There is none of this name.
        """
        missing = set() if GENERATE_BATCH else {"generate_batch"}
        if (self.device, self.dtype) != ("cpu", "float32"):
            missing.add(PREPACKED)
        known = [name for name in possible if name not in missing]
        names = list(dict.fromkeys(self.only)) or [name for name in usual if name in known]
        if unknown := [name for name in names if name not in known]:
            raise InvalidRequestError(f"there is no candidate {unknown[0]!r} here, only {', '.join(known)}.")
        if unknown := [name for name in self.peers if name not in PEERS]:
            raise InvalidRequestError(f"there is no peer {unknown[0]!r}, only {', '.join(PEERS)}.")
        return [*names, *dict.fromkeys(self.peers)]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model.

        Raises:
            InvalidRequestError: torch has none of this name that models can have.
        """
        found = getattr(torch, self.dtype, None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise InvalidRequestError(f"dtype is {self.dtype!r}: it is float32, bfloat16 or float16.")
        return found

    def limits(self) -> dict[str, int]:
        """Those of the batcher."""
        limits = dict(LIMITS.get(self.device.partition(":")[0], {}))
        own = {name: getattr(self, name) for name in ("max_num_seqs", "max_num_batched_tokens")}
        return limits | {name: value for name, value in own.items() if value is not None}

    def for_json(self) -> dict[str, Any]:
        """What rounds must have in common to belong together."""
        found = asdict(self) | {"threads": self.threads or torch.get_num_threads(), **self.limits()}
        return {name: value for name, value in found.items() if name not in ("rounds", "only", "peers", "peer_python")}


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many inside; None changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def servers(settings: Settings, names: list[str], model: Any, workloads: list[Workload]) -> Iterator[list[Server]]:
    """Everybody of these names, ready; engines in processes of their own run until the end.

    Raises:
        InvalidRequestError: A request is longer than the model's positions.
        PeerError: An engine does not start.
    """
    _require_room(model, workloads)
    with ExitStack() as stack:
        makers: dict[str, Callable[[], Server]] = {
            "loop": lambda: Loop(model),
            "padded": lambda: Padded(model, size=settings.padded_size),
            "generate_batch": lambda: GenerateBatch(model),
            "vllm": lambda: stack.enter_context(_vllm(settings, model, workloads, stack)),
        }
        ours = {name: Ours(model, name, settings.room, settings.limits()) for name in OURS}
        yield [ours[name] if name in ours else makers[name]() for name in names]


@torch.no_grad()
def compare(
    everybody: list[Server],
    case: Case,
    workload: Workload,
    pace: Pace | None,
    read: Callable[[Run, Workload], Metrics],
    settings: Settings,
    tick: Tick,
) -> list[Line]:
    """Warms up with the first requests, then measures whoever came through; every run is checked.

    Raises:
        WrongAnswerError: One of ours has other tokens than the reference, in float32.
    """
    check = same_tokens if settings.dtype == "float32" else lambda found, expected: None

    reference = _reference(everybody[0], workload, settings, tick)

    def turns(who: list[Server], load: Workload, when: Pace | None, rounds: int) -> list[Line]:
        answer = reference and reference[: len(load.prompts)]
        judge = Judge(answer)
        tasks = [Task(server, load, when, read, judge) for server in who]
        return measure(tasks, OURS, case, rounds=rounds, warm_up=0, check=check, answer=answer, tick=tick)

    failed = [line for line in turns(everybody, workload.first(CHECKED), None, rounds=1) if line.note]
    right = [server for server in everybody if server.name not in {line.candidate for line in failed}]
    return [*turns(right, workload, pace, settings.rounds), *failed]


def _reference(first: Server, workload: Workload, settings: Settings, tick: Tick) -> list[list[int]] | None:
    """Tokens of a loop that is not timed, where nobody but ours would be the reference; None where that is the first one."""
    if not isinstance(first, Ours) or settings.dtype != "float32":
        return None
    tick("loop, for its tokens")
    return Loop(first.model).serve(workload).tokens


def checked_by(settings: Settings, names: list[str]) -> str:
    """For a title: what tokens are compared with, where it is nobody in the table, or only ours."""
    if names[0] not in OURS:
        return ""
    if settings.dtype == "float32":
        return "; tokens are those of a loop that was not timed"
    return f"; tokens compared with those of {names[0]} only"


class Judge:
    """Counts requests that have the expected tokens: by default those of the first run that it sees."""

    def __init__(self, expected: list[list[int]] | None = None) -> None:
        self._expected = expected or []

    def num_equal(self, tokens: list[list[int]]) -> int:
        """Of one run."""
        self._expected = self._expected or tokens
        return sum(found == expected for found, expected in zip(tokens, self._expected, strict=True))


@dataclass(frozen=True)
class Task:
    """A candidate: one server with its work."""

    server: Server
    workload: Workload
    pace: Pace | None
    read: Callable[[Run, Workload], Metrics]
    judge: Judge

    @property
    def name(self) -> str:
        """The server's."""
        return self.server.name

    def run(self) -> Sample:
        """Serves all requests once."""
        run = self.server.serve(self.workload, self.pace)
        metrics = self.read(run, self.workload) | {"num_equal": self.judge.num_equal(run.tokens)}
        return Sample(run.tokens, metrics)


def same_tokens(found: list[list[int]], expected: list[list[int]]) -> None:
    """The check.

    Raises:
        Wrong: A request has other tokens.
    """
    wrong = [i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs]
    if not wrong:
        return
    ours, theirs = found[wrong[0]], expected[wrong[0]]
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    what = f"has {len(ours)} tokens instead of {len(theirs)}"
    if at is not None:
        what = f"differs at its token {at}: {ours[at]} instead of {theirs[at]}"
    raise Wrong(f"request {wrong[0]} {what}; {len(wrong)} of {len(expected)} requests in all")


def _require_room(model: Any, workloads: list[Workload]) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(workload.max_tokens for workload in workloads)
    if most is not None and longest > most:
        raise InvalidRequestError(f"a request has {longest} tokens with its answer, the model has {most} positions.")


def _vllm(settings: Settings, model: Any, workloads: list[Workload], stack: ExitStack) -> Vllm:
    """With room for all requests at once, as our pool has, and the same number of sequences at a time."""
    where = models.folder(settings.model)
    if where is None:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model.save_pretrained(where)
    most = max(workload.num_prompt_tokens + workload.num_new_tokens for workload in workloads)
    kv_bytes = math.ceil(1.25 * most * models.kv_bytes_per_token(model)) + 2**26
    options = {
        "model": str(where.resolve()),
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "enforce_eager": settings.device == "cpu",
        "max_model_len": max(workload.max_tokens for workload in workloads),
        "enable_prefix_caching": True,  # as in our pools; emptied before each round, as those are
    }
    if "max_num_seqs" in settings.limits():
        options["max_num_seqs"] = settings.limits()["max_num_seqs"]
    return Vllm(settings.peer_python, options, kv_bytes, torch.get_num_threads())
