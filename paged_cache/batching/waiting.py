"""Requests that wait, in the order of a policy and with a bound on overtaking. Plain Python."""

import logging
from bisect import bisect_left, insort
from collections.abc import Generator, Iterator
from heapq import heapify, heappop, heappush
from numbers import Real
from typing import Any

from ..errors import InvalidRequestError
from .policy import Outlook, Policy
from .request import Request
from .user_code import RAISED

logger = logging.getLogger("paged_cache")

Entry = tuple[float, int, Request]


class Line:
    """The waiting requests of one priority.

    A request leaves the heaps late: entries of requests that do not wait any more are dropped when they come to the front, or
    all at once when they are the majority. Key and number never change, so an entry says the truth or is dropped.

    The bound: with A first admissions so far, the earliest of those that wait (number i) is *overdue* once A >= i + B, and then it
    alone is a candidate. For every request i that waits for its first admission this keeps A <= i + B, by induction: it holds
    at arrival, since no more were admitted than arrived. Where another one is admitted, i is not overdue and earliest
    both, so either i is the earliest and A < i + B, or the earliest has a number o < i, and A <= o + B < i + B if it
    never ran; if it did, it is not overdue, A < o + B, or it is itself the one admitted, which A does not count. So A
    is at most i + B afterwards, and i is the (i + B + 1)st to be admitted at the latest. Cancelled requests only
    leave; preempted ones come back under their number and count no second time.

    Attributes:
        num_arrived, num_admitted: So far; only the first admission of a request counts.
        num_live: Requests that wait or run.
    """

    def __init__(self, policy: Policy, max_displacement: float) -> None:
        self._policy, self._max_displacement = policy, max_displacement
        self._lanes: dict[float, list[Entry]] = {}
        self._arrivals: list[Entry] = []
        self._members: dict[Request, None] = {}
        self.num_arrived = self.num_admitted = self.num_live = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def __contains__(self, request: object) -> bool:
        return request in self._members

    def is_overdue(self, request: Request) -> bool:
        """Whether as many were admitted before it as may be."""
        return self.num_admitted >= request.number + self._max_displacement

    def push(self, request: Request) -> None:
        """Lets a request wait, for the first time or again."""
        self._members[request] = None
        heappush(self._arrivals, (request.number, request.number, request))
        self._push_key(request)

    def discard(self, request: Request) -> None:
        """Takes a request out. Its entries in the heaps go later."""
        del self._members[request]
        if len(self._arrivals) > 2 * len(self._members) + 64:
            self._compact()

    def candidates(self, now: float) -> Generator[Request, None, None]:
        """Who may be admitted, in order; the line may change meanwhile."""
        passed: list[Request] = []
        try:
            while self._members:
                earliest = self._front(self._arrivals)
                if self.is_overdue(earliest):
                    yield earliest
                    if earliest in self._members:
                        return
                    continue
                request = self._pop(now, passed)
                if request is None:
                    return
                passed.append(request)
                yield request
        finally:
            for request in passed:
                if request in self._members:
                    self._push_key(request)

    def _push_key(self, request: Request) -> None:
        heappush(self._lanes.setdefault(self._policy.lane(request), []), (request.key, request.number, request))

    def _front(self, heap: list[Entry]) -> Request:
        while heap[0][2] not in self._members:
            heappop(heap)
        return heap[0][2]

    def _pop(self, now: float, passed: list[Request]) -> Request | None:
        """The first one in the policy's order that is not among `passed`."""
        best, best_rank = None, 0.0
        for lane, heap in list(self._lanes.items()):
            while heap and (heap[0][2] not in self._members or heap[0][2] in passed):
                heappop(heap)
            if not heap:
                del self._lanes[lane]
                continue
            rank = self._rank(heap[0][0], lane, now)
            if best is None or (rank, heap[0][1]) < (best_rank, best[0][1]):
                best, best_rank = heap, rank
        return heappop(best)[2] if best else None

    def _rank(self, key: float, lane: float, now: float) -> float:
        """What the policy says; the key, if it fails: that is no request's fault."""
        try:
            return float(self._policy.rank(key, lane, now))
        except RAISED as error:
            if not self._policy.has_warned:
                logger.warning(
                    "policy %r cannot rank, keys are taken: %s: %s", self._policy.name, type(error).__name__, error
                )
            self._policy.has_warned = True
            return key

    def _compact(self) -> None:
        """Drops the entries of requests that do not wait, and those that are there twice."""
        self._arrivals = [(request.number, request.number, request) for request in self._members]
        heapify(self._arrivals)
        self._lanes.clear()
        for request in self._members:
            self._push_key(request)


class WaitingLines:
    """One `Line` per priority, for as long as a request of it waits or runs.

    Args:
        policy: The order within a line.
        max_displacement: How many later ones may be admitted before a request of the same priority, at most.

    Attributes:
        work: Sum over the requests that wait.
    """

    def __init__(self, policy: Policy, max_displacement: float) -> None:
        self._policy, self._max_displacement = policy, max_displacement
        self._lines: dict[int, Line] = {}
        self._priorities: list[int] = []
        self._num_waiting = 0
        self.work = 0.0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        for priority in self._priorities:
            yield from self._lines[priority]

    def give_key(self, request: Request, outlook: Outlook) -> None:
        """Sets the key of a request that is to arrive.

        Raises:
            InvalidRequestError: What would order it is no number.
        """
        key, lane = self._policy.key(request, outlook), self._policy.lane(request)
        given: dict[str, Any] = {"priority": request.priority, "key": key, "lane": lane}
        for name, value in given.items():
            if not isinstance(value, Real) or value != value:
                raise InvalidRequestError(
                    f"{name} {value!r} of request {request.request_id!r} (policy {self._policy.name!r}): a number is needed."
                )
        request.key = key

    def arrive(self, request: Request) -> None:
        """Gives a new request its number and lets it wait."""
        line = self._lines.get(request.priority)
        if line is None:
            line = self._lines[request.priority] = Line(self._policy, self._max_displacement)
            insort(self._priorities, request.priority)
        request.number = line.num_arrived
        line.num_arrived += 1
        line.num_live += 1
        self.push(request)

    def leave(self, request: Request) -> None:
        """The request is over."""
        line = self._lines[request.priority]
        line.num_live -= 1
        if not line.num_live:
            del self._lines[request.priority]
            del self._priorities[bisect_left(self._priorities, request.priority)]

    def push(self, request: Request) -> None:
        """Lets a request wait, that arrives or comes back."""
        self._lines[request.priority].push(request)
        self._num_waiting += 1
        self.work += request.work

    def discard(self, request: Request) -> None:
        """Takes a waiting request out."""
        self._lines[request.priority].discard(request)
        self._num_waiting -= 1
        self.work = self.work - request.work if self._num_waiting else 0.0

    def admit(self, request: Request, is_first: bool) -> None:
        """Takes out a request that runs from now on."""
        self.discard(request)
        self._lines[request.priority].num_admitted += is_first

    def is_overdue(self, request: Request) -> bool:
        """Whether no more may be admitted before the request."""
        return self._lines[request.priority].is_overdue(request)

    def candidates(self, now: float) -> Generator[Request, None, None]:
        """Who may be admitted, in order. It ends before the next priority if anybody of this one is left."""
        for priority in list(self._priorities):
            line = self._lines[priority]
            yield from line.candidates(now)
            if len(line):
                return
