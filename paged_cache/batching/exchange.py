"""Two threads that take turns: one asks, the other answers."""

import threading
from typing import Any


class Closed(BaseException):
    """Nobody asks any more."""


class Exchange:
    """Questions and their answers, by number, one at a time.

    An interrupt may come anywhere in `ask`: who asks the same number again gets the one answer to it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._question: tuple[int, Any] = (-1, None)
        self._answer: tuple[int, Any] = (-1, None)
        self._is_closed = False

    def ask(self, number: int, question: Any, timeout: float) -> Any:
        """The answer to question `number`, 0 being the first.

        Raises:
            TimeoutError: It did not come in so many seconds.
        """
        with self._changed:
            self._question = number, question
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._answer[0] == number, timeout):
                raise TimeoutError
            return self._answer[1]

    def question(self, number: int) -> Any:
        """Waits for question `number`.

        Raises:
            Closed: It will not come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._question[0] == number)
            if self._is_closed:
                raise Closed
            return self._question[1]

    def answer(self, number: int, answer: Any) -> None:
        """To question `number`, for whoever asks it."""
        with self._changed:
            self._answer = number, answer
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits for a question leaves."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
