"""Requests that are not over, and how they come to their end."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..compat import logger
from .deadlines import Deadlines
from .processing import make_output
from .reporting import Reports
from .request import Request, Status
from .scheduler import Scheduler
from .user_code import RAISED, as_error


class Roster:
    """The requests under way. Each gets the one and only output, whatever fails while it ends.

    Args:
        scheduler: Takes their blocks back.
        reports: Are told of the end.
        clock: Seconds.
        tokenizer: Goes to the outputs, for their text.

    Attributes:
        requests: By id.
        finished: How many requests are over, by finish reason.
    """

    def __init__(self, scheduler: Scheduler, reports: Reports, clock: Callable[[], float], tokenizer: Any) -> None:
        self._scheduler, self._reports, self._clock, self._tokenizer = scheduler, reports, clock, tokenizer
        self.requests: dict[str, Request] = {}
        self.finished: Counter[str] = Counter()
        self._deadlines = Deadlines()

    def enter(self, request: Request) -> bool:
        """Whether no other one has its id."""
        if self.requests.setdefault(request.request_id, request) is not request:
            return False
        if request.number < 0:
            self._deadlines.add(request)
        return True

    def pop_due(self, now: float) -> Iterator[Request]:
        """Those whose time is over."""
        return self._deadlines.pop_due(now)

    def finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends a request, in whatever state: its blocks go back, and its handle gets the one and only output."""
        if not self.forget(request):
            return
        decoding = request.decoding
        try:
            if reason in ("stop", "length"):
                self._scheduler.observe_output(request, max(map(len, decoding.sequences()), default=0))
            self._scheduler.remove(request)
            decoding.close()
        except Exception as raised:  # noqa: BLE001 (whatever is wrong, nobody is to wait for the end forever)
            reason, error = "error", error or raised
        finally:
            self._tell(request, reason, error)

    def reject(self, request: Request, error: Exception) -> None:
        """Ends a request that never began."""
        request.status = Status.FINISHED
        self._tell(request, "rejected", error)

    def forget(self, request: Request) -> bool:
        """It is under way no more; whether it was."""
        if self.requests.get(request.request_id) is not request:
            return False
        del self.requests[request.request_id]
        self._deadlines.discard(request)
        return True

    def _tell(self, request: Request, reason: str, error: Exception | None) -> None:
        """Whoever reads the streamer or holds the handle hears of the end."""
        streamer = request.decoding.streamer
        try:
            if streamer is not None:
                streamer.end()
        except RAISED as raised:
            if error is None:
                reason, error = "error", as_error(raised)
        finally:
            self.finished[reason] += 1
            if error is not None:
                kind = type(error).__name__
                logger.warning("request %s ended (%s): %s: %s", request.request_id, reason, kind, error)
            now = self._clock()
            output = make_output(request, reason, error, now, self._tokenizer)
            if self._reports.observers and request.request_id not in self.requests:  # that one is not over
                self._reports.finished(request, output, now)  # who ends the handle
            else:
                request.handle._finish(output)
