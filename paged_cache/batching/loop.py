"""Lets any thread use an engine: an inbox, one stepper at a time, and whoever waits does the work unless a thread does."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import TypeVar

from ..compat import logger
from ..errors import PagedCacheError
from .beam_search import is_beam_search
from .engine import Engine
from .request import Request

Answer = TypeVar("Answer")

MOST_INTERRUPTS = 10
"""Steps of the batcher's thread that may be interrupted one after the other."""

IDLE_SECONDS = 0.01
"""Pause after a step in which nothing could be computed: blocks are held outside the batcher."""


class _End:
    """Holds nothing and takes no lock: whatever a finalizer holds is alive, and it runs in the middle of anything."""

    has_come = False

    def come(self) -> None:
        self.has_come = True


class EngineLoop:
    """Steps an engine.

    Args:
        engine: Whose steps; nobody else may use it.
        max_queue_size: Requests that may wait; None for any number.

    Attributes:
        pending: Requests that the engine does not know yet, by id.
    """

    def __init__(self, engine: Engine, max_queue_size: int | None = None) -> None:
        self._engine, self._max_queue_size = engine, max_queue_size
        self.pending: dict[str, Request] = {}
        self._inbox: deque[Request | str] = deque()
        self._door = threading.RLock()  # closed while requests go from the inbox to the engine
        self._stepping = threading.Lock()
        self._stepper: int | None = None
        self._changed = threading.Condition()
        self._num_waiters = 0
        self._thread: threading.Thread | None = None
        self._end = _End()

    @property
    def is_over(self) -> bool:
        """Whether it was stopped."""
        return self._end.has_come

    @property
    def has_work(self) -> bool:
        """Whether requests are not over."""
        return bool(self._engine.requests or self._inbox)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, those in the inbox included."""
        with self._door:
            return self._engine.scheduler.num_waiting + len(self.pending)

    def has_room(self) -> bool:
        """Whether one more may wait."""
        return self._max_queue_size is None or self.num_waiting < self._max_queue_size

    def is_under_way(self, request_id: str) -> bool:
        """Whether a request of this name is not over."""
        return request_id in self._engine.requests or request_id in self.pending

    def try_enter(self, request: Request) -> bool:
        """Hands a request to the engine's next step; False if the queue is full."""
        with self._door:
            if not self.has_room():
                return False
            self.pending[request.request_id] = request
            self._inbox.append(request)
        if self.is_over and not self._is_inside():
            self._end_all("abort")
        self._tell()
        return True

    def cancel(self, request_id: str, wait: bool = True) -> None:
        """Ends a request; it is over when this returns, or when the step that calls this is.

        Its handle waits for observers, if there are any, to have heard of it; this does not, while another thread tells them.

        Args:
            request_id: Of the request.
            wait: False to leave it to the next step, whoever does that; takes no lock.
        """
        self._inbox.append(request_id)
        if wait and not self._is_inside():
            with self._exclusive():
                self._drain()
            self._report()

    def do(self, action: Callable[[], None]) -> None:
        """Does something between two steps; nothing if this is called inside of one."""
        if not self._is_inside():
            with self._exclusive():
                action()

    def between_steps(self, question: Callable[[], Answer]) -> Answer:
        """The answer to a question that is asked when no step is under way.

        Raises:
            PagedCacheError: Called from inside a step.
        """
        if self._is_inside():
            raise PagedCacheError("this was called from inside a step of the batcher: ask between two steps.")
        with self._exclusive():
            return question()

    def reject(self, request: Request, error: Exception) -> None:
        """Ends a request that never began."""
        self._engine.reject(request, error)
        self._report()

    def step(self) -> bool:
        """One step of the engine; whether anything was computed.

        Raises:
            PagedCacheError: Called from inside a step, by a streamer or a processor.
        """
        self._require_outside()
        try:
            with self._exclusive():
                self._drain()
                is_done = self._engine.step()
                self._drain()  # who was cancelled in the step is over with it
                return is_done
        finally:
            self._report(wait=True)

    def wait(self, is_met: Callable[[], bool], timeout: float | None = None) -> None:
        """Returns when a condition holds; steps the engine until then if no thread does.

        Raises:
            TimeoutError: It did not hold within `timeout` seconds.
            PagedCacheError: Called from inside a step, which would wait for itself.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not is_met():
            self._engine.reports.end_heard()
            if is_met():
                return
            self._require_outside()
            left = 1.0 if end is None else end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not within {timeout} seconds; the request goes on.")
            if self._is_served():
                self._wait_for_change(lambda: is_met() or not self._is_served(), min(left, 1.0))
            elif not self.step() and not is_met():
                time.sleep(min(left, IDLE_SECONDS))

    def start(self) -> None:
        """A thread of its own steps from now on."""
        if not self._is_started():
            self._thread = threading.Thread(target=self._run, name="paged-cache-batcher", daemon=True)
            self._thread.start()

    def end_with(self, owner: object) -> None:
        """When the owner is garbage, so is the thread, if there is one, soon."""
        weakref.finalize(owner, self._end.come)

    def stop(self) -> None:
        """Ends the thread, and all requests with finish reason "abort".

        Raises:
            PagedCacheError: Called from inside a step.
        """
        self._require_outside()
        self._end.come()
        self._tell()
        if self._thread is not None:
            self._thread.join()
        self._end_all("abort")

    def _run(self) -> None:
        interrupts, num_steps, kind = 0, 0, ""
        while not self.is_over:
            try:
                if interrupts >= MOST_INTERRUPTS:  # no Ctrl-C, which the main thread gets: it would go on forever
                    interrupts = 0
                    self._end_all("error", PagedCacheError(f"every step was interrupted by {kind}."))
                self._serve()
                interrupts = 0
            except BaseException as raised:  # noqa: BLE001, PERF203 (the step was taken back, the next one goes on)
                logger.exception("a step was interrupted")
                interrupts = interrupts + 1 if num_steps == self._engine.num_steps else 1
                num_steps, kind = self._engine.num_steps, type(raised).__name__

    def _serve(self) -> None:
        """Waits for work, or does a step whose errors nobody else would see."""
        if not self.has_work:
            self._report()  # what an interrupt left
            self._wait_for_change(lambda: self.has_work or self.is_over, 1.0)
            if not self.has_work:
                self._engine.rest()
                self._report()
            return
        try:
            if not self.step():
                time.sleep(IDLE_SECONDS)
        except Exception as error:  # noqa: BLE001 (whoever waits shall hear of it)
            logger.exception("a step failed")
            self._end_all("error", error)

    def _end_all(self, reason: str, error: Exception | None = None) -> None:
        with self._exclusive():
            self._drain()
            with ExitStack() as stack:  # goes on whatever is raised
                for request in reversed(list(self._engine.requests.values())):
                    stack.callback(self._engine.finish, request, reason, error)
        self._report(wait=True)

    def _is_started(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _is_served(self) -> bool:
        """Whether somebody steps, or tells observers of it."""
        return self._is_started() or self._stepping.locked() or self._engine.reports.is_busy

    def _is_inside(self) -> bool:
        """Whether this was called by a streamer, a processor or a listener."""
        return self._stepper == threading.get_ident() or is_beam_search()

    def _require_outside(self) -> None:
        if self._is_inside():
            raise PagedCacheError("a step of the batcher cannot wait for itself: this was called from inside a step.")
        if self._engine.reports.is_telling:
            raise PagedCacheError("an observer cannot wait for steps: they wait for it.")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._stepping:
            self._stepper = threading.get_ident()
            try:
                yield
            finally:
                self._stepper = None

    def _drain(self) -> None:
        """Takes in what is in the inbox. Each leaves it when that is done: an interrupt loses nobody."""
        for kind, group in groupby(self._inbox.copy(), type):
            if kind is str:
                for request_id in group:
                    self._abort(str(request_id))
                    self._inbox.popleft()
            else:
                self._take([item for item in group if isinstance(item, Request)])

    def _take(self, requests: list[Request]) -> None:
        with self._door:
            self._engine.add(*requests)
            for request in requests:
                self.pending.pop(request.request_id, None)
                self._inbox.popleft()

    def _abort(self, request_id: str) -> None:
        if request_id in self._engine.requests:
            self._engine.finish(self._engine.requests[request_id], "abort")

    def _wait_for_change(self, is_met: Callable[[], bool], timeout: float) -> None:
        with self._changed:
            self._num_waiters += 1
            try:
                if not is_met():
                    self._changed.wait(timeout)
            finally:
                self._num_waiters -= 1

    def _report(self, wait: bool = False) -> None:
        """Observers hear what happened, when no step is under way; then those who wait look again."""
        try:
            reports = self._engine.reports
            if (reports.untold or reports.endings) and not self._is_inside():
                reports.tell(wait)
        finally:
            self._tell()

    def _tell(self) -> None:
        if self._num_waiters:
            with self._changed:
                self._changed.notify_all()
