"""Reports of an engine: events are made where things happen and told to observers behind the step."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from ..compat import logger
from .events import Event, Finished, Generated, Idle, Observer, Preempted, Prefilled, Queued, Scheduled, StepDone
from .handle import RequestHandle
from .output import RequestOutput
from .plan import StepPlan
from .pool_memory import PoolMemory
from .request import Chunk, Request
from .scheduler import Scheduler
from .user_code import RAISED

Ending: TypeAlias = tuple[RequestHandle, RequestOutput]
"""A handle that is to end, and with what."""


class Reports:
    """Who observes an engine, and what they have not heard yet.

    The engine asks `if reports.observers` and calls the methods below only then: with nobody there, nothing is done.
    Observers hear of events in order, one at a time, outside of the engine's locks, from the thread that did the step. A
    request's handle comes to its end when they have heard of it, so that whoever has a result finds it in their books.

    Args:
        scheduler, memory: Looked at for `StepDone`.

    Attributes:
        observers: Those that are called.
        untold: What they have not heard yet: events, those who are still to hear of each, and handles that end with them.
        endings: What they have heard of, or hear of now, and has not ended yet.
    """

    def __init__(self, scheduler: Scheduler, memory: PoolMemory) -> None:
        self._scheduler, self._memory = scheduler, memory
        self.observers: tuple[Observer, ...] = ()
        self.untold: deque[tuple[Event, Iterator[Observer], Ending | None]] = deque()
        self.endings: deque[Ending] = deque()
        self._changing, self._telling = threading.Lock(), threading.Lock()
        self._teller: int | None = None
        self._clear()

    def add(self, observer: Observer) -> None:
        """Calls `observer` with every event from now on."""
        with self._changing:
            self.observers = (*self.observers, observer)

    def remove(self, observer: Observer) -> None:
        """Calls `observer`, or what equals it as bound methods do, no more."""
        with self._changing:
            self.observers = tuple(other for other in self.observers if other != observer)

    @property
    def is_telling(self) -> bool:
        """Whether this was called by an observer."""
        return self._teller == threading.get_ident()

    @property
    def is_busy(self) -> bool:
        """Whether observers are being told."""
        return self._telling.locked()

    def tell(self, wait: bool) -> None:
        """Hands out what is untold and ends handles. Nothing if an observer calls this.

        Args:
            wait: Until that is done, whoever does it; False to leave it to the thread that is at it, if one is.

        Raises:
            KeyboardInterrupt: Or whatever else of an observer is no `Exception`: what is left waits for the next time.
        """
        if self.is_telling:
            return
        while (self.untold or self.endings) and self._telling.acquire(blocking=wait):
            self._teller = threading.get_ident()
            try:
                self._hand_out()
            finally:
                self._teller = None
                self._telling.release()

    def end_heard(self) -> None:
        """An observer may have the result of what it hears the end of; nothing if anybody else calls this."""
        if self.is_telling:
            self._end_told()

    def _hand_out(self) -> None:
        """What is untold. Handles end behind the step that they ended in, which counts their last tokens."""
        while self.untold:
            event, ears, ending = self.untold[0]
            if ending is not None:
                self.endings.append(ending)
            for observer in ears:  # who was interrupted has heard of it, the others go on from here
                if observer in self.observers:
                    self._call(observer, event)
            self.untold.popleft()
            if isinstance(event, StepDone):
                self._end_told()
        self._end_told()

    def _end_told(self) -> None:
        while self.endings:
            ending = handle, output = self.endings[0]
            if not handle.done:
                handle._finish(output)
            if self.endings and self.endings[0] is ending:  # a listener may have come here, too
                self.endings.popleft()

    def _call(self, observer: Observer, event: Event) -> None:
        try:
            observer(event)
        except RAISED:
            logger.exception("observer %r failed at %r and is called no more", observer, event)
            self.remove(observer)

    def _note(self, event: Event, ending: Ending | None = None) -> None:
        self.untold.append((event, iter(self.observers), ending))

    def queued(self, requests: list[Request]) -> None:
        """Requests wait for their turn."""
        for request in requests:
            self._note(
                Queued(
                    request.arrival_time,
                    request.request_id,
                    request.num_prompt_tokens,
                    request.max_new_tokens,
                    request.num_rows,
                    request.priority,
                    request.asked_adapter,
                )
            )

    def planned(self, plan: StepPlan, now: float) -> None:
        """Requests come and go for a step."""
        for request in plan.preempted:
            self.preempted(request, now)
        for request in plan.admitted:
            is_first = request.first_token_time is None and not request.num_preemptions
            num_cached = sum(row.num_computed for row in request.rows)
            num_tokens = sum(row.num_tokens for row in request.rows)
            time = now if request.admitted_time is None or not is_first else request.admitted_time  # as in `queue_time`
            self._note(Scheduled(time, request.request_id, num_tokens, num_cached, is_first))
            if is_first:
                request.num_prefilled = num_cached
                self._num_cached += num_cached

    def preempted(self, request: Request, now: float) -> None:
        """A request lost its blocks."""
        self._note(Preempted(now, request.request_id, request.num_preemptions))

    def computed(self, chunks: list[Chunk], start: float, now: float) -> None:
        """A forward came to its end; the tokens are not chosen yet."""
        prefills: dict[str, tuple[Request, int, int]] = {}
        for request, row, num_tokens in chunks:
            self._num_tokens += num_tokens
            position = row.num_computed - num_tokens
            if num_tokens == 1 and request.first_token_time is not None and row.num_computed == row.num_tokens:
                continue  # the token that was chosen last
            if request.first_token_time is None:
                self._num_prompt += max(row.num_computed - max(position, request.num_prefilled), 0)
                request.num_prefilled = max(row.num_computed, request.num_prefilled)
            _, first, count = prefills.get(request.request_id, (request, position, 0))
            prefills[request.request_id] = request, first, count + num_tokens
        self._num_rows += len(chunks)
        for name, (request, position, count) in prefills.items():
            is_again = request.first_token_time is not None
            self._note(Prefilled(now, name, start, position, count, is_again))

    def generated(self, request: Request, num_tokens: int, now: float) -> None:
        """Tokens of a request are chosen; its times are still those of before."""
        is_first = request.first_token_time is None
        before = request.last_token_time
        seconds = now - (request.arrival_time if before is None else before)
        self._num_generated += num_tokens
        self._note(Generated(now, request.request_id, num_tokens, is_first, seconds))

    def finished(self, request: Request, output: RequestOutput, now: float) -> None:
        """A request is over; its handle is when observers have heard of it."""
        error, num_sequences = output.error, request.num_return_sequences
        self._note(
            Finished(
                now,
                request.request_id,
                output.finish_reason,
                None if error is None else f"{type(error).__name__}: {error}",
                len(output.prompt_ids),
                output.cached_tokens,
                sum(map(len, output.sequences[:num_sequences])),  # a beam search that goes on has all beams
                num_sequences,
                request.max_new_tokens,
                output.metrics,
                (request.last_token_time or 0.0) - (request.first_token_time or 0.0),
            ),
            (request.handle, output),
        )

    @property
    def has_computed(self) -> bool:
        """Whether tokens were computed since the last step came to its end."""
        return self._num_tokens > 0

    def step_done(self, start: float, now: float) -> None:
        """A step came to its end."""
        self._note(
            StepDone(
                now,
                start,
                self._num_tokens,
                self._num_prompt,
                self._num_cached,
                self._num_generated,
                self._num_rows,
                self._scheduler.num_running,
                self._scheduler.num_waiting,
                self._memory.num_blocks - self._memory.num_free,
                self._memory.num_blocks,
            )
        )
        self._clear()

    def idle(self, now: float) -> None:
        """There is nothing to do."""
        memory = self._memory
        self._note(Idle(now, memory.num_blocks - memory.num_free, memory.num_blocks))

    def _clear(self) -> None:
        """The next step begins."""
        self._num_tokens = self._num_prompt = self._num_cached = self._num_generated = self._num_rows = 0
