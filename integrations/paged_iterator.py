"""Outputs of a paged pipeline: in the order of their inputs, read ahead only so far."""

import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.pipelines.pt_utils import PipelineIterator

from paged_cache import RequestHandle

SECONDS_BETWEEN_READS = 0.02


@dataclass
class Pending:
    """An input whose output nobody took yet.

    Attributes:
        index: Of the input.
        handle: Its request; None if it came to none.
        error: Why it came to none.
        about: What is needed to make an output of the answer.
    """

    index: int
    handle: RequestHandle | None = None
    error: Exception | None = None
    about: Any = None

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self.handle is None or self.handle.done

    def wait(self, seconds: float) -> bool:
        """Does the batcher's work meanwhile; whether it is done."""
        if self.handle is not None:
            with suppress(TimeoutError):
                self.handle.result(seconds)
        return self.done


class PagedIterator(PipelineIterator):
    """One output per input. An input that fails raises in its turn, and `next` goes on with the one behind it.

    Inputs are read while outputs are taken, and steps are done by whoever takes them. What is read and not taken is given
    up by `close`, at the end of a `with` block, or when the iterator is garbage.

    Args:
        inputs: Anything with a length and items, or an iterable.
        begin: Called with an index and an input: hands a request in.
        finish: Called with a `Pending` that is done: returns its output or raises.
        end: Called with the number of inputs when there are no more, where that is not known before: raises what is wrong.
        max_unfinished: Requests under way at most.
        read_ahead: Inputs read and not taken at most; None for any number.
        is_eager: Whether somebody waits for all outputs: the first error gives up the rest.
        returns_errors: Whether errors are outputs.
        progress_bar: Whether a terminal shows a bar.
    """

    def __init__(
        self,
        inputs: Any,
        begin: Callable[[int, Any], Pending],
        finish: Callable[[Pending], Any],
        end: Callable[[int], None],
        *,
        max_unfinished: int,
        read_ahead: int | None,
        is_eager: bool,
        returns_errors: bool,
        progress_bar: bool,
    ) -> None:
        super().__init__(inputs, finish, {})  # type: ignore[no-untyped-call]
        self._begin, self._end = begin, end
        self._max_unfinished, self._read_ahead = max_unfinished, read_ahead
        self._is_eager, self._returns_errors, self._shows_bar = is_eager, returns_errors, progress_bar
        self._readers: Iterator[tuple[int, Callable[[], Any]]] | None = None
        self._pending: deque[Pending] = deque()
        self._unfinished: list[Pending] = []
        self._bar: Any = None
        self._is_closed = False
        weakref.finalize(self, _cancel, self._pending, wait=False).atexit = False

    def __iter__(self) -> "PagedIterator":
        """A dataset begins anew; a generator or an iterator goes on."""
        if self._is_closed or (self._readers is not None and _is_read_once(self.loader)):
            return self
        self._give_up()
        self._readers = enumerate(_readers(self.loader))
        self._bar = tqdm(total=_length(self.loader), unit="prompt", disable=None if self._shows_bar else True)
        return self

    def __next__(self) -> Any:
        if self._readers is None:
            iter(self)
        try:
            output = self._take()
        except BaseException as error:
            if self._is_eager or not isinstance(error, Exception) or isinstance(error, StopIteration):
                self._give_up()
            raise
        self._bar.update()
        return output

    def close(self) -> None:
        """Ends it: the requests of what was not taken end, too, and their blocks are free."""
        self._is_closed = True
        self._give_up()

    def _give_up(self) -> None:
        _cancel(self._pending)
        self._unfinished.clear()
        self._readers = iter(())
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "PagedIterator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Any:
        self._read()
        while self._pending and not self._pending[0].wait(SECONDS_BETWEEN_READS):
            self._read()
        if not self._pending:
            raise StopIteration
        pending = self._pending.popleft()
        try:
            return self._finish(pending)
        except Exception as error:
            if self._returns_errors:
                return error
            raise

    def _finish(self, pending: Pending) -> Any:
        if pending.error is not None:
            raise pending.error
        return self.infer(pending)

    def _read(self) -> None:
        """Begins as many inputs as there is room for."""
        self._unfinished = [pending for pending in self._unfinished if not pending.done]
        while len(self._unfinished) < self._max_unfinished and len(self._pending) != self._read_ahead:
            pending = self._read_one()
            if pending is None:
                return
            self._pending.append(pending)
            self._unfinished.append(pending)
            if pending.done and self._is_eager and not self._returns_errors:
                self._finish(pending)  # it was never begun and raises

    def _read_one(self) -> Pending | None:
        index, reader = next(self._readers or iter(()), (0, None))
        if reader is None:
            return None
        try:
            return self._begin(index, reader())
        except StopIteration:
            self._readers = iter(())
        except Exception as error:  # noqa: BLE001 (whatever it is, it comes when it is this input's turn)
            return Pending(index, error=error)
        try:
            self._end(index)
        except Exception as error:  # noqa: BLE001 (behind the last output)
            return Pending(index, error=error)
        return None


def _cancel(pending: deque[Pending], wait: bool = True) -> None:
    while pending:
        handle = pending.pop().handle
        if handle is not None:
            handle.cancel(wait)


def _is_read_once(inputs: Any) -> bool:
    return isinstance(inputs, Iterator) and not isinstance(inputs, Dataset)


def _length(inputs: Any) -> int | None:
    try:
        return len(inputs)
    except TypeError:
        return None


def _readers(inputs: Any) -> Iterator[Callable[[], Any]]:
    """A function per input: one that cannot be read does not end the others."""
    if isinstance(inputs, Sized) and not isinstance(inputs, IterableDataset):
        return (partial(operator.getitem, inputs, index) for index in range(len(inputs)))
    return repeat(partial(next, iter(inputs)))
