"""The engine: one step after the other, for whoever calls. It knows no threads and no tokenizer."""

import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from ..compat import is_out_of_memory, logger
from ..errors import InvalidRequestError, OutOfBlocksError
from .adapter_forward import AdapterForward, by_adapter
from .adapter_store import AdapterStore
from .budget import Budget
from .plan import StepPlan, requests_of, rest_of
from .pool_memory import PoolMemory
from .processing import OutputProcessor
from .reporting import Reports
from .request import Chunk, Request, Status
from .roster import Roster
from .scheduler import Scheduler
from .stopwatch import Stopwatch
from .user_code import RAISED, as_error

BLOCKED_SECONDS = 10.0
"""How long the first request waits for blocks that somebody outside the batcher holds, while nothing else runs."""


class Engine:
    """Scheduling, execution and output processing of one step at a time.

    Args:
        forward: Executes steps.
        memory: The pool's blocks.
        scheduler: Plans steps, on the same memory.
        adapters: Those that requests may name.
        clock: Seconds.
        tokenizer: Goes to the outputs, for their text.

    Attributes:
        requests, finished, finish, reject: See `Roster`.
        outputs: Turns logits into tokens.
        reports: Who observes, and what happened.
        num_steps, num_tokens: Steps executed, and tokens computed in them.
        peak_blocks: Most blocks in use after a step.
        forward_seconds, step_seconds: Time in the model, and in all.
    """

    def __init__(
        self,
        forward: AdapterForward,
        memory: PoolMemory,
        scheduler: Scheduler,
        adapters: AdapterStore,
        clock: Callable[[], float] = time.monotonic,
        tokenizer: Any = None,
    ) -> None:
        self.forward, self.memory, self.scheduler, self.adapters = forward, memory, scheduler, adapters
        self._clock = clock
        self.reports = Reports(scheduler, memory)
        self._roster = Roster(scheduler, self.reports, clock, tokenizer)
        self.requests, self.finished = self._roster.requests, self._roster.finished
        self.finish, self.reject = self._roster.finish, self._roster.reject
        self.outputs = OutputProcessor(forward, memory, scheduler, self.reports, self.finish, clock)
        self.num_steps = self.num_tokens = self.peak_blocks = 0
        self.forward_seconds = self.step_seconds = 0.0
        self._budget = Budget(scheduler.max_num_batched_tokens)
        self._blocked_since: float | None = None

    def add(self, *requests: Request) -> None:
        """Lets requests wait for their turn; those that come together are ordered together.

        Raises:
            KeyboardInterrupt: Or whatever else is no `Exception`: add them again, those that are in are left alone.
        """
        new = []
        for request in requests:
            if request.status is Status.FINISHED:
                continue
            if not self._roster.enter(request):
                self.reject(request, InvalidRequestError(f"request_id {request.request_id!r} is under way."))
            elif request.number < 0:
                new.append(request)
        try:
            self._add_new(new)
        except BaseException:
            for request in new:
                if request.number < 0:
                    self._roster.forget(request)
            raise

    def _add_new(self, requests: list[Request]) -> None:
        wrong = None
        try:
            self.scheduler.add(*requests)
        except RAISED as raised:
            if len(requests) > 1:  # only the one that it fails for is to suffer
                for request in requests:
                    self._add_new([request])
                return
            wrong = as_error(raised)
        if self.reports.observers:
            self.reports.queued(requests)
        if wrong is not None:
            self.finish(requests[0], "error", wrong)

    def step(self) -> bool:
        """Executes one step; whether anything was computed.

        Raises:
            KeyboardInterrupt: Or whatever else is no `Exception`: the step is taken back, all requests go on.
        """
        start = self._clock()
        for request in self._roster.pop_due(start):
            self.finish(request, "timeout")
        is_done = False
        try:
            with torch.no_grad():
                is_done = self._compute()
        finally:
            end = self._clock()
            if is_done:
                self.num_steps += 1
                self.step_seconds += end - start
            if self.reports.observers and (is_done or self.reports.has_computed):
                self.reports.step_done(start, end)
        self.adapters.sweep()
        return is_done

    def rest(self) -> None:
        """There is nothing to do."""
        if self.reports.observers:
            self.reports.idle(self._clock())

    def _compute(self) -> bool:
        """Plans, executes and gives out tokens, again with less if memory runs out; whether that came to its end."""
        least = 2**62
        while True:
            self.memory.begin_step(self.scheduler.running)
            plan = self.scheduler.schedule(self._budget.limit)
            if self.reports.observers:
                self.reports.planned(plan, self._clock())
            if not plan.chunks:
                return self._wait_for_blocks()
            self._begin(plan)
            if not plan.chunks:
                continue
            count = sum(chunk.num_tokens for chunk in plan.chunks)
            try:
                self._execute(plan, count)
            except OutOfBlocksError:  # somebody outside the batcher took blocks since the plan was made
                self._rewind(plan)
                victim = self.scheduler.preempt()
                if victim is None:
                    return self._wait_for_blocks()
                if self.reports.observers:
                    self.reports.preempted(victim, self._clock())
            except Exception as error:  # noqa: BLE001 (whatever the model raises, the others go on)
                self._rewind(plan)
                self._blocked_since = None
                if not is_out_of_memory(error):
                    return self._isolate(plan.chunks, error)
                if not 1 < count < least:  # a prompt that is computed in one piece may be more than the budget
                    return self._fail([max(plan.chunks, key=lambda chunk: chunk.num_tokens)], error)
                least = count
                self._use_less(count)
            except BaseException:
                self._rewind(plan)
                raise
            else:
                self._budget.recover()
                return True

    def _wait_for_blocks(self) -> bool:
        """Nothing gets on: if there are requests, their blocks are held outside the batcher, but not forever."""
        waiting = sorted(self.scheduler.waiting, key=lambda request: (request.priority, request.key))
        now, first = self._clock(), next(chain(self.scheduler.running, waiting), None)
        if first is None:
            self._blocked_since = None
            return False
        self._blocked_since = now if self._blocked_since is None else self._blocked_since
        if now - self._blocked_since >= BLOCKED_SECONDS:
            self._blocked_since = None
            needed = sum(self.memory.growth(row, row.num_tokens - row.num_computed) for row in first.rows)
            self.finish(first, "error", OutOfBlocksError(needed, self.memory.num_free))
        return False

    def _execute(self, plan: StepPlan, count: int) -> None:
        kv_tokens = sum(row.num_computed + n for _, row, n in plan.chunks)
        places = [row.num_computed for _, row, _ in plan.chunks]
        watch = Stopwatch(self._clock, self.memory.pool.devices)
        try:
            logits = self.forward(plan.chunks)
        except BaseException:
            self._count_part(plan.chunks, places, watch.begun)
            raise
        watch.stop(logits)
        self._blocked_since = None
        self.num_tokens += count
        self.peak_blocks = max(self.peak_blocks, self.memory.num_blocks - self.memory.num_free)
        try:
            chosen = self.outputs.choose(plan, logits)
        finally:  # not before: on a GPU the first look at what was chosen waits for the forward, and nothing else does
            seconds, now = watch.read()
            self.forward_seconds += seconds
            self.scheduler.observe_step(seconds, count, kv_tokens)
            if self.reports.observers:
                self.reports.computed(plan.chunks, watch.begun, now)
        self.outputs.give(chosen)

    def _begin(self, plan: StepPlan) -> None:
        failed = self.adapters.errors(chunk.request for chunk in plan.chunks)
        for request, error in failed:
            self.finish(request, "error", error)
        fresh = [chunk.request for chunk in plan.chunks if not chunk.request.decoding.rows]
        for request in fresh:
            if request.status is Status.RUNNING:
                self.outputs.begin(request)
        if fresh or failed:  # a streamer may have failed at the prompt
            plan.chunks = [chunk for chunk in plan.chunks if chunk.request.status is Status.RUNNING]
        plan.chunks = by_adapter(plan.chunks)

    def _count_part(self, chunks: list[Chunk], places: list[int], start: float) -> None:
        """A step that failed after some of its forwards: what they stored of prompts counts."""
        pairs = zip(chunks, places, strict=True)
        stored = [Chunk(request, row, row.num_computed - place) for (request, row, _), place in pairs]
        done = [chunk for chunk in stored if chunk.num_tokens and chunk.request.first_token_time is None]
        self.num_tokens += sum(chunk.num_tokens for chunk in done)
        if self.reports.observers and done:
            self.reports.computed(done, start, self._clock())

    def _rewind(self, plan: StepPlan) -> None:
        """Rows whose logits were lost, since something stopped the step behind their forward, are computed again."""
        self.forward.settle()
        for request in requests_of(plan.chunks):
            if any(row.num_computed == row.num_tokens for row in request.rows):
                self.memory.release(request)
                self.memory.admit(request)

    def _use_less(self, count: int) -> None:
        """A step of so many tokens ran out of memory."""
        self._budget.use_less(count)
        if any(device.type == "cuda" for device in self.memory.pool.devices):
            torch.cuda.empty_cache()

    def _isolate(self, chunks: list[Chunk], error: Exception) -> bool:
        """A step failed: only requests that fail alone are to suffer; whether anything was computed."""
        requests = requests_of(chunks)
        if len(requests) == 1:
            return self._fail(chunks, error)
        kind = type(error).__name__
        logger.warning("a step of %d requests failed, each is computed alone: %s: %s", len(requests), kind, error)
        running = [request for request in requests if request.status is Status.RUNNING]
        return sum(map(self._execute_alone, running)) > 0

    def _execute_alone(self, request: Request) -> bool:
        """Whether anything was computed: with less if memory runs out; without enough blocks it waits for the next step."""
        while True:
            plan = StepPlan(rest_of(request, 2**62 if self.forward.whole_prompts else self._budget.tokens))
            count = sum(chunk.num_tokens for chunk in plan.chunks)
            try:
                self._execute(plan, count)
            except OutOfBlocksError:
                self._rewind(plan)
                return False
            except Exception as error:  # noqa: BLE001 (whatever the model raises, the others go on)
                self._rewind(plan)
                if count == 1 or self.forward.whole_prompts or not is_out_of_memory(error):
                    return self._fail(plan.chunks, error)
                self._use_less(count)
            except BaseException:
                self._rewind(plan)
                raise
            else:
                return True

    def _fail(self, chunks: list[Chunk], error: Exception) -> bool:
        for request in requests_of(chunks):
            self.finish(request, "error", error)
        return False
