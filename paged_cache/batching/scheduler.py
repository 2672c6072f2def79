"""Who computes what in the next step. Plain Python, no threads, any clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from ..errors import InvalidRequestError
from .adapter_slots import AdapterSlots
from .estimates import Estimates
from .forecast import Forecast
from .plan import Memory, Prefix, SchedulerStats, StepPlan
from .policy import Policy, make_policy
from .request import Chunk, Request, Status
from .room import Room
from .waiting import WaitingLines

__all__ = ["Memory", "Prefix", "Scheduler", "SchedulerStats", "StepPlan"]

DISPLACEMENT_PER_ROW = 16
MOST_KEPT_OUT = 256  # candidates that have to wait for another adapter to go: they cost next to nothing


class Scheduler:
    """Admits waiting requests, plans steps, and takes blocks away where there are too few.

    A step has all rows that decode, then pieces of the prompts of running requests, then of newly admitted ones. A request is admitted when, by forecast, it and all that run will find their blocks; up to `backfill` requests
    that cannot be are passed over, unless overdue: nobody is admitted past an overdue request.

    Promises, proved in docs/scheduling.md:
        *Bound.* Request number i of its priority is among the first i + max_displacement + 1 that are admitted, whatever
        the keys; first admissions count. See `waiting.Line`.
        *Progress.* Of the running requests, the first by `_rank` is never preempted while there are others, so it
        runs to its end if it fits into the memory alone.

    Args:
        memory: Where the blocks come from.
        policy: "sjf" (with aging), "fcfs", "sjf-no-aging", "hrrn", or a `Policy` object.
        max_num_seqs: Rows that run at once.
        max_num_batched_tokens: Tokens of a step.
        clock: Seconds; arrival times are on it.
        whole_prompts: A prompt is computed in one piece, however long; beyond the budget one in a step.
        max_chunk: Most tokens of one prompt in a step.
        max_loras: Different adapters that run at once; None for any number. The next in order of the others may run meanwhile.
        max_displacement: In place of the policy's.
        backfill: Candidates that are passed over in a step at most.
        headroom: Share of the blocks that is left to errors of the forecast.

    Raises:
        InvalidRequestError: There is no such policy, or a limit is not positive.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        policy: str | Policy = "sjf",
        max_num_seqs: int,
        max_num_batched_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        whole_prompts: bool = False,
        max_chunk: int | None = None,
        max_loras: int | None = None,
        max_displacement: float | None = None,
        backfill: float = 4,
        headroom: float = 0.02,
    ) -> None:
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        optional = {"max_chunk": max_chunk, "max_loras": max_loras}
        for name, value in (limits | optional).items():
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name}={value}: at least 1 is needed.")
        self.memory, self.policy = memory, make_policy(policy)
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        own = self.policy.max_displacement if max_displacement is None else max_displacement
        self.max_displacement = DISPLACEMENT_PER_ROW * max_num_seqs if own is None else own
        self.running: list[Request] = []
        self.num_running_seqs = 0
        self.estimates = Estimates(max_num_seqs, max_num_batched_tokens)
        self._clock, self._whole_prompts, self._max_chunk = clock, whole_prompts, max_chunk
        self._backfill, self._headroom = backfill, headroom
        self._lines, self._adapters = WaitingLines(self.policy, self.max_displacement), AdapterSlots(max_loras)
        self._refused_at = -1  # free blocks when nobody could be admitted; less than that does not help
        self._num_arrived = self._num_admitted = self._num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._lines)

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return len(self.running)

    @property
    def waiting(self) -> Iterator[Request]:
        """The waiting requests, by priority, in no order within one. Take a list of it before anything changes."""
        return iter(self._lines)

    @property
    def stats(self) -> SchedulerStats:
        """What it did and believes."""
        counts = self._num_arrived, self._num_admitted, self._num_preemptions, self.num_waiting, self.num_running
        cost, correlation = self.estimates.step_cost.coefficients, self.estimates.rank_check.correlation
        return SchedulerStats(*counts, self.num_running_seqs, self._lines.work, cost, correlation)

    def add(self, *requests: Request) -> None:
        """Lets requests wait; together is better than one by one, since each key then knows of all of them.

        Sets `number`, `predicted_tokens`, `work` and `key`; `arrival_time` is the caller's.

        Raises:
            InvalidRequestError: One has more rows than may run, was added before, or priority, key or lane is no number. None is added.
        """
        for request in requests:
            if request.number >= 0:
                raise InvalidRequestError(f"request {request.request_id!r} was added before.")
            if request.num_rows > self.max_num_seqs:
                raise InvalidRequestError(
                    f"num_rows={request.num_rows} never fits into max_num_seqs={self.max_num_seqs}."
                )
            self.estimates.assess(request)
        outlook = self.estimates.outlook(self._clock(), self._lines.work + sum(request.work for request in requests))
        for request in requests:
            self._lines.give_key(request, outlook)
        for request in requests:
            self._lines.arrive(request)
        self._num_arrived += len(requests)
        self._refused_at = -1

    def remove(self, request: Request) -> None:
        """Ends a request in whatever state: it leaves queue or running set and gives back its blocks."""
        if request.status is Status.FINISHED or request.number < 0:
            request.status = Status.FINISHED
            return
        if request.status is Status.RUNNING:
            self._stop(request)
        else:
            self._lines.discard(request)
            self.memory.release(request)
        self._lines.leave(request)
        request.status = Status.FINISHED

    def preempt(self) -> Request | None:
        """Takes the blocks of the last running request by `_rank`; it waits again. None if fewer than two run."""
        if len(self.running) < 2:
            return None
        victim = max(self.running, key=self._rank)
        self._stop(victim)
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self._num_preemptions += 1
        self._lines.push(victim)
        return victim

    def shrink(self, request: Request) -> None:
        """Some rows of a running request are complete and gone: others may have their slots and blocks."""
        num_gone = request.num_live - len(request.rows)
        if num_gone:
            request.num_live -= num_gone
            self.num_running_seqs -= num_gone
            self._refused_at = -1

    def observe_output(self, request: Request, num_tokens: int) -> None:
        """Learns from a request that ended by itself and had generated so many tokens per row."""
        self.estimates.observe_output(request, num_tokens)

    def observe_step(self, seconds: float, num_tokens: int, kv_tokens: int) -> None:
        """Learns from a step: tokens computed, and tokens of K and V that its rows read together."""
        self.estimates.step_cost.observe(seconds, num_tokens, kv_tokens)

    def schedule(self, budget: int | None = None) -> StepPlan:
        """Plans the next step; admits and preempts for it.

        Nothing to compute although requests run or wait: what they need at least is held by somebody else.

        Args:
            budget: A smaller number of tokens than usual, for this step.
        """
        limit = self.max_num_batched_tokens if budget is None else max(1, min(budget, self.max_num_batched_tokens))
        preempted: list[Request] = []
        while True:
            plan, is_stuck = self._plan(limit, preempted)
            victim = self.preempt() if is_stuck else None
            if victim is None:
                return plan
            preempted.append(victim)

    def _plan(self, limit: int, preempted: list[Request]) -> tuple[StepPlan, bool]:
        """A plan, and whether prompts hold so many blocks that none of them gets on."""
        plan = StepPlan(preempted=preempted)
        prompts = self._plan_decodes(plan, limit)
        free = self.memory.num_free
        may_admit = free > self._refused_at and self.num_running_seqs < self.max_num_seqs and len(self._lines) > 0
        if prompts or may_admit:
            room = Room(self.memory, limit, free, self._whole_prompts, self._max_chunk)
            for _, row, _ in plan.chunks:
                room.take(row, 1)
            self._plan_prompts(plan, room, prompts)
            if may_admit and not preempted and room.takes_prompts():
                self._admit(plan, room)
        return plan, bool(prompts) and not plan.chunks

    def _plan_decodes(self, plan: StepPlan, limit: int) -> list[tuple[Request, Any, int]]:
        """Puts rows with one token to go into the plan, and preempts until there are blocks for them. Returns the other rows."""
        chunks, prompts = self._rows_to_go(limit)
        free = self.memory.num_free
        if chunks and len(chunks) * self.memory.blocks_for(1) > free:
            while sum(self.memory.growth(row, 1) for _, row, _ in chunks) > free and (victim := self.preempt()):
                plan.preempted.append(victim)
                chunks, prompts = self._rows_to_go(limit)
                free = self.memory.num_free
        plan.chunks = chunks
        return prompts

    def _rows_to_go(self, limit: int) -> tuple[list[Chunk], list[tuple[Request, Any, int]]]:
        chunks: list[Chunk] = []
        prompts: list[tuple[Request, Any, int]] = []
        for request in self.running:
            for row in request.rows:
                num_to_go = row.num_tokens - row.num_computed
                if num_to_go == 1:
                    chunks.append(Chunk(request, row, 1))
                elif num_to_go:
                    prompts.append((request, row, num_to_go))
        return chunks[:limit], prompts

    def _plan_prompts(self, plan: StepPlan, room: Room, prompts: list[tuple[Request, Any, int]]) -> None:
        """Puts pieces of prompts into the plan."""
        for request, row, num_to_go in prompts:
            num_tokens = room.piece(row, num_to_go)
            if num_tokens:
                chunk = Chunk(request, row, num_tokens)
                plan.chunks.append(chunk)
                self.memory.expect(chunk)
                room.take_prompt(row, num_tokens)
                self._refused_at = -1

    def _admit(self, plan: StepPlan, room: Room) -> None:
        """Lets waiting requests run while there are slots, tokens and blocks."""
        forecast, now = Forecast(self.memory, self.running, self._headroom), self._clock()
        num_passed = num_kept_out = 0
        self._refused_at = self.memory.num_free
        with closing(self._lines.candidates(now)) as candidates:  # in the end, those that were passed over go back
            for request in candidates:
                if not self._adapters.has_room(request):
                    num_kept_out += 1
                elif self._can_admit(request, prefix := self.memory.look(request), forecast, room):
                    forecast.add(request, prefix)
                    self._start(request, now, plan, room)
                else:
                    num_passed += 1
                is_full = self.num_running_seqs >= self.max_num_seqs or not room.takes_prompts()
                if is_full or num_passed >= self._backfill or num_kept_out >= MOST_KEPT_OUT:
                    break

    def _can_admit(self, request: Request, prefix: Prefix, forecast: Forecast, room: Room) -> bool:
        """Whether a request finds a slot for each row, blocks for its first piece, and, by forecast, all others."""
        if request.num_live > self.max_num_seqs - self.num_running_seqs:
            return False
        if prefix.is_coming:
            self._refused_at = -1
            return False
        if not self.running:
            return True
        is_room = forecast.blocks_at_once(request, prefix, self._whole_prompts) <= room.blocks
        return is_room and forecast.fits(request, prefix)

    def _start(self, request: Request, now: float, plan: StepPlan, room: Room) -> None:
        """Admits a request and plans its first pieces."""
        num_free, self._refused_at = self.memory.num_free, -1  # if this fails it is tried again
        self.memory.admit(request)
        room.blocks -= num_free - self.memory.num_free
        self._lines.admit(request, is_first=request.admitted_time is None)
        if request.admitted_time is None:
            request.admitted_time = now
            self._num_admitted += 1
        request.status = Status.RUNNING
        self.running.append(request)
        self._adapters.take(request)
        self.num_running_seqs += request.num_live
        plan.admitted.append(request)
        self._plan_prompts(plan, room, [(request, row, row.num_tokens - row.num_computed) for row in request.rows])

    def _stop(self, request: Request) -> None:
        """Takes slots and blocks of a running request."""
        self.running.remove(request)
        self._adapters.give_back(request)
        self.num_running_seqs -= request.num_live
        self.memory.release(request)
        self._refused_at = -1

    def _rank(self, request: Request) -> tuple[int, bool, float, int]:
        """Who runs on: more urgent priorities, then overdue requests by number, then the others by key."""
        if self._lines.is_overdue(request):
            return request.priority, False, request.number, request.number
        return request.priority, True, request.key, request.number
