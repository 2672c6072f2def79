"""When requests are to end. Plain Python."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from .request import Request


class Deadlines:
    """The requests that have a deadline, the earliest first; those that leave before stay in the heap until they are the majority."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._members: set[Request] = set()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, request: Request) -> None:
        """From now on the request may be due, if it has a deadline."""
        if request.deadline is not None:
            self._members.add(request)
            heappush(self._heap, (request.deadline, next(self._numbers), request))

    def discard(self, request: Request) -> None:
        """The request is over."""
        self._members.discard(request)
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if entry[2] in self._members]
            heapify(self._heap)

    def pop_due(self, now: float) -> Iterator[Request]:
        """Takes out the requests whose deadline is not later than `now`."""
        while self._heap and self._heap[0][0] <= now:
            request = heappop(self._heap)[2]
            if request in self._members:
                self._members.discard(request)
                yield request
