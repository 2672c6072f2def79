"""The order of those that wait, and the bound on overtaking whatever the keys are."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from paged_cache.batching.policy import Policy, make_policy
from paged_cache.batching.request import Request
from paged_cache.batching.waiting import WaitingLines


class Given(Policy):
    """Keys come with the requests."""

    def key(self, request, outlook):
        return request.key


def lines_of(keys, max_displacement=10**9, policy=None):
    lines = WaitingLines(policy or Given(), max_displacement)
    requests = [Request(str(i), range(1), 1, key=key, work=1.0) for i, key in enumerate(keys)]
    for request in requests:
        lines.arrive(request)
    return lines, requests


def first(lines, now=0.0):
    candidates = lines.candidates(now)
    request = next(candidates, None)
    candidates.close()
    return request


KEYS = st.one_of(
    st.lists(st.floats(-5, 5), max_size=60),  # random
    st.integers(1, 60).map(lambda n: [float(-i) for i in range(n)]),  # the last first, always
    st.integers(1, 60).map(lambda n: [9.0, *(float(i) for i in range(n - 1))]),  # all before the first
)


@settings(max_examples=300, deadline=None)
@given(KEYS, st.integers(0, 12), st.integers(0, 2**32))
def test_nobody_is_overtaken_too_often(keys, max_displacement, seed):
    """Request i is among the first i + B + 1 first admissions, through refusals, cancellations and preemptions."""
    rng = random.Random(seed)
    lines, (anchor,) = lines_of([0.0], max_displacement)  # it runs for ever, so the numbers go on
    lines.admit(anchor, True)
    coming = [Request(str(i), range(1), 1, key=key, work=1.0) for i, key in enumerate(keys)][::-1]
    admitted, running = [anchor], []
    while coming or len(lines):
        act = rng.choice(["arrive", "arrive", "admit", "admit", "cancel", "preempt", "end"])
        if act == "arrive" and coming:
            lines.arrive(coming.pop())
        elif act == "admit":
            num_refused = rng.randint(0, 3)
            for request in list(lines.candidates(0.0))[num_refused : num_refused + 1]:
                is_first = request not in admitted
                lines.admit(request, is_first)
                running.append(request)
                admitted += [request] * is_first
        elif act == "cancel" and len(lines) and rng.random() < 0.2:
            request = rng.choice(list(lines))
            lines.discard(request)
            lines.leave(request)
        elif act == "preempt" and running:
            lines.push(running.pop(rng.randrange(len(running))))
        elif act == "end" and running:
            lines.leave(running.pop(0))

    assert [place for place, request in enumerate(admitted) if place > request.number + max_displacement] == []


def test_the_smallest_key_is_first():
    """Without a bound, keys decide, and arrival among equals; what was passed over comes back to its place."""
    lines, requests = lines_of([3.0, 1.0, 2.0, 1.0])

    assert [request.key for request in lines.candidates(0.0)] == [1.0, 1.0, 2.0, 3.0]
    assert first(lines) is requests[1]
    lines.admit(requests[1], True)
    assert first(lines) is requests[3]
    assert len(lines) == len(list(lines)) == lines.work == 3


def test_an_overdue_one_is_the_only_candidate():
    """After B others, the earliest request is offered alone until it runs."""
    lines, requests = lines_of([9.0, 1.0, 2.0, 3.0], max_displacement=2)
    for request in requests[1:3]:
        lines.admit(request, True)

    assert list(lines.candidates(0.0)) == [requests[0]]
    lines.admit(requests[0], True)
    assert first(lines) is requests[3]


def test_those_that_left_leave_nothing_behind():
    """The heaps stay as small as the line, however many come and go, and however often one is put back."""
    lines, (long, *_) = lines_of([1e9])
    for i in range(5000):
        request = Request(str(i), range(1), 1, key=float(i))
        lines.arrive(request)
        lines.discard(request)
        lines.leave(request)
        lines.discard(long)
        lines.push(long)
    line = lines._lines[0]

    assert len(line._arrivals) < 300
    assert sum(map(len, line._lanes.values())) < 300
    assert list(lines) == [long] == list(lines.candidates(0.0))


def test_priorities_come_and_go():
    """A priority is remembered as long as a request of it waits or runs; the more urgent one is offered alone."""
    lines = WaitingLines(Given(), 5)
    requests = [Request(str(i), range(1), 1, priority=priority) for i, priority in enumerate([2, 1, 2])]
    for request in requests:
        lines.arrive(request)

    assert list(lines) == [requests[1], requests[0], requests[2]]
    assert [request.number for request in requests] == [0, 0, 1]
    assert list(lines.candidates(0.0)) == [requests[1]]
    lines.admit(requests[1], True)
    assert first(lines) is requests[0]
    lines.leave(requests[1])
    assert lines._priorities == [2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from([0.5, 1.0, 4.0, 64.0])), min_size=1, max_size=40))
def test_ratios_are_exact_for_rounded_works(arrivals):
    """With works that are powers of two, lanes give the same order as all response ratios computed anew."""
    lines = WaitingLines(make_policy("hrrn"), 10**9)
    requests = [Request("", range(1), 1, arrival_time=time, work=work) for time, work in sorted(arrivals)]
    for request in requests:
        request.key = request.arrival_time
        lines.arrive(request)
    now = 101.0
    while requests:
        chosen = first(lines, now)
        best = max((now - request.arrival_time) / request.work for request in requests)
        assert (now - chosen.arrival_time) / chosen.work == pytest.approx(best)
        requests.remove(chosen)
        lines.admit(chosen, True)
        now += chosen.work
