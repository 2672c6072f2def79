"""Who is next: policies turn a request into a key, once, when it arrives. Plain Python."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from ..errors import InvalidRequestError
from .request import Request


class Outlook(NamedTuple):
    """What a policy may know when a request arrives, besides the request with its `work` and `predicted_tokens`.

    Attributes:
        now: The clock, seconds.
        mean_work: Mean `work` of recent requests, seconds of a slot's time.
        backlog: Seconds until all that wait, this one included, would be served first come, first served.
        trust: How well predictions agree with what requests turn out to need: 0 not at all, 1 well enough to follow them.
    """

    now: float
    mean_work: float
    backlog: float
    trust: float


class Policy(ABC):
    """An order of waiting requests. Subclass it and define `key` to bring your own.

    The key of a request is fixed when it arrives; the smallest is served first, equal ones in order of arrival. Classes of
    `request.priority` are served strictly one after the other, whatever the keys. A policy may keep state: give each
    scheduler its own object.

    Attributes:
        name: For people.
        max_displacement: How many later arrivals may be served before a request (of the same priority) at most;
            None: 16 for each sequence that may run at once. `math.inf` gives requests that starve no help.
    """

    name: str = "own"
    max_displacement: float | None = None
    has_warned = False  # that `rank` fails: once, as lines come and go

    @abstractmethod
    def key(self, request: Request, outlook: Outlook) -> float:
        """Its place in the order; called once per request, when it arrives."""

    def lane(self, request: Request) -> float:
        """Requests of one lane keep the order of their keys; only the first of each lane is asked for its `rank`."""
        return 0.0

    def rank(self, key: float, lane: float, now: float) -> float:
        """Which lane is served first, the smallest. It may change with time; few lanes make it cheap."""
        return key


class FirstComeFirstServed(Policy):
    """Strictly in order of arrival; who does not fit is waited for."""

    name = "fcfs"
    max_displacement = 0

    def key(self, request: Request, outlook: Outlook) -> float:
        """The time of arrival."""
        return request.arrival_time


class PlainShortestJobFirst(Policy):
    """The least expected work first. The best mean latency; long requests may starve."""

    name = "sjf-no-aging"
    max_displacement = math.inf

    def key(self, request: Request, outlook: Outlook) -> float:
        """The work."""
        return request.work


class ShortestJobFirst(Policy):
    """Shortest job first with aging, as a due time: arrival plus a share of a window that grows with the work.

    `key = arrival + window * phi(work)` with phi from 0 to 1, so a request is passed by nobody who arrives later than a window
    after it. The window follows the backlog, `patience * (mean work + backlog)`, up at once and down no faster than the
    clock runs: of two requests with equal work, the earlier one stays ahead. docs/scheduling.md has the proofs.

    Args:
        patience: Mean works and backlogs in a window. Smaller values are fairer and gain less.
        knee: Share of the mean work below which phi is nearly linear; it is 1 from 20 knees on.
    """

    name = "sjf"

    def __init__(self, patience: float = 6.0, knee: float = 1.0) -> None:
        self.patience, self.knee = patience, knee
        self._window = self._time = -math.inf

    def key(self, request: Request, outlook: Outlook) -> float:
        """When it is due. Where predictions are worthless, the time of arrival."""
        time = request.arrival_time
        fading = self._window - (time - self._time) if self._window > 0 else 0.0
        self._window = max(self.patience * (outlook.mean_work + outlook.backlog), fading)
        self._time = time
        return time + outlook.trust * self._window * self._phi(request.work, outlook.mean_work)

    def _phi(self, work: float, mean_work: float) -> float:
        knee = self.knee * mean_work
        return min(1.0, math.log1p(work / knee) / math.log(21.0)) if knee > 0 else 0.0


class HighestResponseRatioNext(Policy):
    """The largest (wait + work) / work first: short requests, and those that waited long for their size. No parameters.

    Requests with nearly the same work (steps of 19 %) share a lane and are served in order of arrival, which is exact there.
    """

    name = "hrrn"

    def key(self, request: Request, outlook: Outlook) -> float:
        """The time of arrival."""
        return request.arrival_time

    def lane(self, request: Request) -> float:
        """The work, rounded to quarters of an octave."""
        return float(2.0 ** (round(4 * math.log2(max(request.work, 1e-9))) / 4))

    def rank(self, key: float, lane: float, now: float) -> float:
        """The response ratio without its constant one, negated."""
        return (key - now) / lane


POLICIES: dict[str, Callable[[], Policy]] = {
    policy.name: policy
    for policy in (ShortestJobFirst, FirstComeFirstServed, PlainShortestJobFirst, HighestResponseRatioNext)
}


def make_policy(policy: str | Policy) -> Policy:
    """The policy of a name, or the object itself.

    Raises:
        InvalidRequestError: There is no policy of that name.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise InvalidRequestError(
            f"policy={policy!r} is unknown: use one of {names}, or an object of a Policy subclass."
        )
    return POLICIES[policy]()
