"""The engine: one step after the other, for whoever calls. It knows no threads and no tokenizer."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ..compat import is_out_of_memory, logger
from ..errors import InvalidRequestError, OutOfBlocksError
from .forwards import Forward
from .plan import StepPlan
from .pool_memory import PoolMemory
from .processing import OutputProcessor, make_output
from .request import Chunk, Request, Status
from .scheduler import Scheduler

BLOCKED_SECONDS = 10.0
"""How long the first request waits for blocks that somebody outside the batcher holds, while nothing else runs."""

RECOVERY_STEPS = 16
"""After so many good steps the token budget that ran out of memory is doubled again."""


class Engine:
    """Scheduling, execution and output processing of one step at a time.

    Args:
        forward: Executes steps.
        memory: The pool's blocks.
        scheduler: Plans steps, on the same memory.
        clock: Seconds.
        tokenizer: Goes to the outputs, for their text.

    Attributes:
        requests: Those that are not over, by id.
        finished: How many requests are over, by finish reason.
        outputs: Turns logits into tokens.
        num_steps, num_tokens: Steps executed, and tokens computed in them.
        peak_blocks: Most blocks in use after a step.
        forward_seconds, step_seconds: Time in the model, and in all.
    """

    def __init__(
        self,
        forward: Forward,
        memory: PoolMemory,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
        tokenizer: Any = None,
    ) -> None:
        self.forward, self.memory, self.scheduler = forward, memory, scheduler
        self._clock, self._tokenizer = clock, tokenizer
        self.requests: dict[str, Request] = {}
        self.finished: Counter[str] = Counter()
        self.outputs = OutputProcessor(forward, memory, self.finish)
        self.num_steps = self.num_tokens = self.peak_blocks = 0
        self.forward_seconds = self.step_seconds = 0.0
        self._budget: int | None = None
        self._good_steps = 0
        self._blocked_since: float | None = None
        self._num_deadlines = 0

    def add(self, *requests: Request) -> None:
        """Lets requests wait for their turn; those that come together are ordered together."""
        new = []
        for request in requests:
            if request.request_id in self.requests:
                self.reject(request, InvalidRequestError(f"request_id {request.request_id!r} is under way."))
                continue
            self.requests[request.request_id] = request
            self._num_deadlines += request.deadline is not None
            new.append(request)
        try:
            self.scheduler.add(*new)
        except Exception as error:  # noqa: BLE001 (a user's policy may raise anything)
            if len(new) == 1:
                self.finish(new[0], "error", error)
            else:
                self._add_one_by_one(new)

    def _add_one_by_one(self, requests: list[Request]) -> None:
        """The policy fails for one of them: only that one is to suffer."""
        for request in requests:
            try:
                self.scheduler.add(request)
            except Exception as error:  # noqa: BLE001, PERF203 (see above)
                self.finish(request, "error", error)

    def step(self) -> bool:
        """Executes one step; whether anything was computed.

        Raises:
            KeyboardInterrupt: Or whatever else is no `Exception`: the step is taken back, all requests go on.
        """
        start = self._clock()
        self._expire(start)
        with torch.no_grad():
            plan, logits = self._compute()
            if plan is None:
                self._look_blocked(start)
                return False
            try:
                self.outputs.process(plan, logits, self._clock())
            except BaseException:
                self._rewind(plan)
                raise
        self.num_steps += 1
        self.step_seconds += self._clock() - start
        return True

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends a request, in whatever state: its blocks go back, and its handle gets the one and only output."""
        if self.requests.pop(request.request_id, None) is None:
            return
        decoding = request.decoding
        if reason in ("stop", "length"):
            self.scheduler.observe_output(request, max(map(len, decoding.sequences()), default=0))
        self._num_deadlines -= request.deadline is not None
        self.scheduler.remove(request)
        request.held.clear()
        decoding.close()
        if decoding.streamer is not None:  # also after an error: somebody may be waiting for what comes next
            try:
                decoding.streamer.end()
            except Exception as raised:  # noqa: BLE001 (a user's streamer may raise anything)
                reason, error = "error", error or raised
            except BaseException:
                self._tell(request, reason, None)
                raise
        self._tell(request, reason, error)

    def reject(self, request: Request, error: Exception) -> None:
        """Ends a request that never began."""
        self._tell(request, "rejected", error)

    def _tell(self, request: Request, reason: str, error: Exception | None) -> None:
        self.finished[reason] += 1
        if error is not None:
            logger.warning("request %s ended (%s): %s: %s", request.request_id, reason, type(error).__name__, error)
        request.handle._finish(make_output(request, reason, error, self._clock(), self._tokenizer))

    def _expire(self, now: float) -> None:
        if self._num_deadlines:
            for request in [r for r in self.requests.values() if r.deadline is not None and r.deadline <= now]:
                self.finish(request, "timeout")

    def _look_blocked(self, now: float) -> None:
        """Nothing gets on although there are requests: their blocks are held outside the batcher, but not forever."""
        if not self.requests:
            self._blocked_since = None
            return
        self._blocked_since = now if self._blocked_since is None else self._blocked_since
        if now - self._blocked_since >= BLOCKED_SECONDS:
            self._blocked_since = None
            waiting = sorted(self.scheduler.waiting, key=lambda request: (request.priority, request.key))
            first = [*self.scheduler.running, *waiting][0]
            needed = sum(self.memory.growth(row, row.num_tokens - row.num_computed) for row in first.rows)
            self.finish(first, "error", OutOfBlocksError(needed, self.memory.num_free))

    def _compute(self) -> tuple[StepPlan | None, torch.Tensor]:
        """Plans and executes, again with less if memory runs out. No plan if there is nothing to compute, or all of it failed."""
        least = 2**62
        while True:
            self.memory.begin_step(self.scheduler.running)
            plan = self.scheduler.schedule(self._budget)
            self._begin(plan)
            if not plan.chunks:
                return None, torch.empty(0)
            count = sum(chunk.num_tokens for chunk in plan.chunks)
            try:
                logits = self._execute(plan, count)
            except OutOfBlocksError:  # somebody outside the batcher took blocks since the plan was made
                self._rewind(plan)
                victim = self.scheduler.preempt()
                if victim is None:
                    return None, torch.empty(0)
                victim.held.clear()
            except Exception as error:  # noqa: BLE001 (whatever the model raises, the others go on)
                self._rewind(plan)
                if not is_out_of_memory(error):
                    return self._fail(plan.chunks, error)
                if not 1 < count < least:  # a prompt that is computed in one piece may be more than the budget
                    return self._fail([max(plan.chunks, key=lambda chunk: chunk.num_tokens)], error)
                least = count
                self._use_less(count)
            except BaseException:
                self._rewind(plan)
                raise
            else:
                self._recover()
                return plan, logits

    def _use_less(self, count: int) -> None:
        """A step of so many tokens ran out of memory."""
        self._budget, self._good_steps = count // 2, 0
        logger.warning("out of memory with %d tokens in a step, trying %d", count, self._budget)
        if self.memory.pool.device.type == "cuda":
            torch.cuda.empty_cache()

    def _execute(self, plan: StepPlan, count: int) -> torch.Tensor:
        kv_tokens = sum(row.num_computed + n for _, row, n in plan.chunks)
        start = time.perf_counter()
        logits = self.forward(plan.chunks)
        seconds = time.perf_counter() - start
        self._blocked_since = None
        self.forward_seconds += seconds
        self.num_tokens += count
        self.peak_blocks = max(self.peak_blocks, self.memory.num_blocks - self.memory.num_free)
        self.scheduler.observe_step(seconds, count, kv_tokens)
        return logits

    def _begin(self, plan: StepPlan) -> None:
        for request in plan.preempted:
            request.held.clear()
        fresh = [chunk.request for chunk in plan.chunks if not chunk.request.decoding.rows]
        for request in fresh:
            self.outputs.begin(request)
        if fresh:  # a streamer may have failed at the prompt
            plan.chunks = [chunk for chunk in plan.chunks if chunk.request.status is Status.RUNNING]

    def _rewind(self, plan: StepPlan) -> None:
        """Rows whose logits were lost, since something stopped the step behind their forward, are computed again."""
        self.forward.settle()
        for request in {id(chunk.request): chunk.request for chunk in plan.chunks}.values():
            if any(row.num_computed == row.num_tokens for row in request.rows):
                request.held.clear()
                self.memory.release(request)
                self.memory.admit(request)

    def _recover(self) -> None:
        if self._budget is None:
            return
        self._good_steps += 1
        if self._good_steps >= RECOVERY_STEPS:
            self._good_steps, self._budget = 0, self._budget * 2
            if self._budget >= self.scheduler.max_num_batched_tokens:
                self._budget = None

    def _fail(self, chunks: list[Chunk], error: Exception) -> tuple[None, torch.Tensor]:
        for request in {id(chunk.request): chunk.request for chunk in chunks}.values():
            self.finish(request, "error", error)
        return None, torch.empty(0)
