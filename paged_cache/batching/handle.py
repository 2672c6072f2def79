"""What a caller holds of a request that is under way."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..compat import logger
from .output import RequestOutput
from .user_code import RAISED

Listener = Callable[[int | None], None]


class RequestHandle:
    """Iterate over it for tokens as they come, ask for its `result`, or `cancel` it; from any thread.

    Where no thread of the batcher runs (see `ContinuousBatcher.start`), whoever waits does the work.

    Args:
        request_id: Of the request.
        wait: Called with a condition and seconds (or None): returns when the condition holds.
        cancel: Ends the request of this name, at once or in the next step.
        owner: The batcher, which lives until the request is over.
    """

    def __init__(
        self,
        request_id: str,
        wait: Callable[[Callable[[], bool], float | None], None],
        cancel: Callable[[str, bool], None],
        owner: object = None,
    ) -> None:
        self.request_id, self._owner = request_id, owner
        self._wait, self._cancel = wait, cancel
        self._tokens: list[int] = []
        self._output: RequestOutput | None = None
        self._listeners: list[Listener] = []
        self._ending = threading.Lock()

    @property
    def tokens(self) -> list[int]:
        """Tokens of the first sequence so far; of a beam search none before its end."""
        return list(self._tokens)

    @property
    def done(self) -> bool:
        """Whether `result` has something to return."""
        return self._output is not None

    def __iter__(self) -> Iterator[int]:
        """Tokens of the first sequence, as they are chosen.

        Raises:
            Exception: What ended the request, if it was an error.
        """
        count = 0
        while self._output is None or count < len(self._tokens):
            self._wait(partial(self._has_more_than, count), None)
            fresh = self._tokens[count:]
            count += len(fresh)
            yield from fresh
        if self._output.error is not None:
            raise self._output.error

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the end.

        Args:
            timeout: Seconds to wait at most; the request goes on.

        Raises:
            TimeoutError: It was not over by then.
        """
        self._wait(lambda: self._output is not None, timeout)
        assert self._output is not None
        return self._output

    def cancel(self, wait: bool = True) -> None:
        """Ends the request with finish reason "abort", unless it is over. It keeps the tokens it has.

        Args:
            wait: Until it is over; observers, if there are any, hear of it before it is `done`. With False it ends in the next
                step: nothing is locked, so that finalizers may do it.
        """
        if self._output is None:  # later requests may have its id
            self._cancel(self.request_id, wait)

    def add_listener(self, listener: Listener) -> None:
        """Calls `listener` with each further token, and once with None at the end; from the thread that does the work."""
        with self._ending:
            is_over = self._output is not None
            if not is_over:
                self._listeners.append(listener)
        if is_over:
            self._call(listener, None)

    def _has_more_than(self, count: int) -> bool:
        return self._output is not None or len(self._tokens) > count

    def _push(self, token: int) -> None:
        self._tokens.append(token)
        if self._listeners:
            self._tell(token)

    def _finish(self, output: RequestOutput) -> None:
        self._tokens += output.generated_tokens[len(self._tokens) :]
        with self._ending:
            self._output = output
        self._tell(None)
        self._owner = None

    def _tell(self, token: int | None) -> None:
        for listener in self._listeners:
            self._call(listener, token)

    def _call(self, listener: Listener, token: int | None) -> None:
        try:
            listener(token)
        except RAISED:
            logger.exception("a listener of request %s failed", self.request_id)

    def __repr__(self) -> str:
        state = self._output.finish_reason if self._output is not None else f"{len(self._tokens)} tokens so far"
        return f"RequestHandle({self.request_id!r}, {state})"


@contextmanager
def cancelling(handles: list[RequestHandle]) -> Iterator[None]:
    """Ends the requests if this does not come to its end."""
    try:
        yield
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
