"""An engine in virtual time around the real scheduler: memory is numbers, a step takes what a formula says."""

import random
from dataclasses import dataclass, field
from typing import Any, cast

from ...batching.request import Chunk, Request
from ...batching.scheduler import Prefix, Scheduler, StepPlan
from .workloads import Job


@dataclass(frozen=True)
class Engine:
    """Limits, and seconds per step, per token, and per token of K and V read.

    The defaults are those of an 8B model in bf16 on a large GPU, guessed.
    """

    slots: int = 16
    budget: int = 1024
    num_blocks: int = 2**17
    block_size: int = 16
    per_step: float = 0.015
    per_token: float = 4e-5
    per_kv: float = 4e-8

    def seconds(self, num_tokens: float, num_kv: float) -> float:
        """What a step takes."""
        return self.per_step + self.per_token * num_tokens + self.per_kv * num_kv


@dataclass(eq=False, slots=True)
class SimulatedRow:
    """A sequence without tokens."""

    num_tokens: int
    num_computed: int = 0
    num_blocks: int = 0


@dataclass
class SimulatedMemory:
    """Blocks as numbers. Cached prefixes are there for ever and fill blocks of their own in each request."""

    num_blocks: int
    block_size: int
    hits: dict[str, int]
    num_free: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_free = self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of a row."""
        return -(-num_tokens // self.block_size)

    def growth(self, row: Any, num_tokens: int) -> int:
        """New blocks for so many more tokens."""
        return self.blocks_for(row.num_computed + num_tokens) - int(row.num_blocks)

    def look(self, request: Request) -> Prefix:
        """The trace says what is cached."""
        return Prefix(self.hits.get(request.request_id, 0), False)

    def admit(self, request: Request) -> None:
        """Fills blocks with what is cached."""
        row = request.rows[0]
        self.compute(row, min(self.hits.get(request.request_id, 0), row.num_tokens - 1))

    def expect(self, chunk: Chunk) -> None:
        """Nothing is shared in here."""

    def release(self, request: Request) -> None:
        """Takes all blocks."""
        rows: list[Any] = list(request.rows)
        for row in rows:
            self.num_free += row.num_blocks
            row.num_blocks = row.num_computed = 0

    def compute(self, row: Any, num_tokens: int) -> None:
        """Fills blocks."""
        num_new = self.growth(row, num_tokens)
        if num_new > self.num_free:
            raise RuntimeError(f"the plan needs {num_new} blocks, {self.num_free} are free")
        self.num_free -= num_new
        row.num_blocks += num_new
        row.num_computed += num_tokens


@dataclass
class Outcome:
    """What became of a request; seconds."""

    job: Job
    waited: float
    first_token: float
    latency: float
    num_preemptions: int


def predicted(jobs: list[Job], kind: str | None) -> list[float | None]:
    """The lengths that requests come with; see `Simulation`."""
    lengths: list[float | None] = [float(job.output) for job in jobs]
    if kind is None:
        return [None] * len(jobs)
    if kind == "random":
        random.Random(0).shuffle(lengths)
    if kind == "reversed":
        least, most = (choose(job.output for job in jobs) for choose in (min, max))
        lengths = [least * most / job.output for job in jobs]
    return lengths


class Simulation:
    """Serves jobs, which are in the order of their times.

    Args:
        engine: The machine.
        jobs: What comes.
        predictions: What each request comes with: nothing, its true length ("oracle"), that of another one ("random"), or one
            that puts the longest first ("reversed").
        skips: Whether steps that only decode, and after which nobody could be admitted, are taken many at a time. The
            scheduler would plan them all alike.
        options: Of the scheduler.
    """

    def __init__(
        self, engine: Engine, jobs: list[Job], predictions: str | None = None, skips: bool = True, **options: Any
    ) -> None:
        self.engine, self._skips = engine, skips
        self.now, self.num_steps = 0.0, 0
        self._jobs = jobs
        lengths = predicted(jobs, predictions)
        self._requests = [self._request(i, *pair) for i, pair in enumerate(zip(jobs, lengths, strict=True))]
        self.memory = SimulatedMemory(
            engine.num_blocks,
            engine.block_size,
            {r.request_id: job.hit for r, job in zip(self._requests, jobs, strict=True)},
        )
        options |= {"max_num_seqs": engine.slots, "max_num_batched_tokens": engine.budget}
        self.scheduler = Scheduler(self.memory, clock=lambda: self.now, **options)
        self._num_arrived = 0
        self._first: dict[str, float] = {}
        self.outcomes: dict[str, Outcome] = {}

    def run(self) -> list[Outcome]:
        """Everything, to the end. In the order of arrival."""
        while len(self.outcomes) < len(self._jobs):
            if not self.scheduler.num_running and not self.scheduler.num_waiting:
                self.now = max(self.now, self._next_time())
            self._arrive()
            plan = self.scheduler.schedule()
            if not plan.chunks:
                raise RuntimeError("nothing gets on: a request does not fit into the memory")
            self._step(plan)
        return [self.outcomes[request.request_id] for request in self._requests]

    @staticmethod
    def _request(index: int, job: Job, expected: float | None) -> Request:
        name, limit, options = str(index), job.max_new, {"expected_tokens": expected, "arrival_time": job.time}
        request = Request(name, range(job.prompt), limit, tenant=job.tenant, **options)  # type: ignore[arg-type]
        request.rows = [SimulatedRow(job.prompt)]  # type: ignore[list-item]  # it counts tokens and has none
        return request

    def _next_time(self) -> float:
        return self._jobs[self._num_arrived].time if self._num_arrived < len(self._jobs) else float("inf")

    def _arrive(self) -> None:
        """All that came until now, each at its time."""
        end = self.now
        while self._next_time() <= end:
            self.now = self._next_time()
            self.scheduler.add(self._requests[self._num_arrived])
            self._num_arrived += 1
        self.now = end

    def _step(self, plan: StepPlan) -> None:
        """Computes a plan, several times where it stays the same."""
        count = self._repeats(plan)
        num_tokens, num_kv = 0, 0
        for chunk in plan.chunks:
            num_tokens += chunk.num_tokens
            num_kv += chunk.row.num_computed + chunk.num_tokens
        mean_kv = num_kv + len(plan.chunks) * (count - 1) / 2
        seconds = self.engine.seconds(num_tokens, mean_kv)
        self.now += count * seconds
        self.num_steps += count
        self._arrive()
        self.scheduler.observe_step(seconds, num_tokens, round(mean_kv))
        for chunk in plan.chunks:
            request, row = chunk.request, cast(Any, chunk.row)
            self.memory.compute(row, chunk.num_tokens * count)
            if row.num_computed >= row.num_tokens:
                row.num_tokens = row.num_computed + 1
                self._emit(request, row.num_tokens - request.num_prompt_tokens)

    def _repeats(self, plan: StepPlan) -> int:
        """How many steps are like this one."""
        scheduler, num_rows = self.scheduler, len(plan.chunks)
        if not self._skips or any(chunk.num_tokens > 1 for chunk in plan.chunks) or num_rows < scheduler.num_running:
            return 1
        if len(self._first) < self.scheduler.stats.num_admitted:
            return 1  # one of them has yet to say its first token
        count = min(self._to_go(request, row.num_tokens) for request, row, _ in plan.chunks)
        if scheduler.num_running_seqs < self.engine.slots:
            if scheduler.num_waiting:
                return 1
            seconds = self.engine.seconds(num_rows, sum(row.num_tokens for _, row, _ in plan.chunks))
            count = min(
                count, max(1, int((self._next_time() - self.now) / seconds) if self._next_time() < 1e18 else count)
            )
        per_row = self.memory.num_free // num_rows
        return max(1, min(count, (per_row - 1) * self.engine.block_size))

    def _to_go(self, request: Request, num_tokens: int) -> int:
        return self._jobs[int(request.request_id)].output - (num_tokens - request.num_prompt_tokens)

    def _emit(self, request: Request, num_generated: int) -> None:
        """A token, or several, the last of which is number `num_generated`."""
        name, job = request.request_id, self._jobs[int(request.request_id)]
        first = self._first.setdefault(name, self.now)
        if num_generated >= job.output:
            self.scheduler.remove(request)
            self.scheduler.observe_output(request, num_generated)
            waited = (request.admitted_time or 0.0) - job.time
            times = waited, first - job.time, self.now - job.time
            self.outcomes[name] = Outcome(job, *times, request.num_preemptions)
