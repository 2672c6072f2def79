"""Deadlines: who is due, and what it costs to ask."""

import random

from paged_cache.batching.deadlines import Deadlines
from paged_cache.batching.request import Request


def request(deadline):
    """A request with a deadline, or None."""
    return Request("", [1], 1, deadline=deadline)


def test_who_is_due():
    """Requests are due once, in the order of their deadlines, unless they left or have none."""
    deadlines, generator = Deadlines(), random.Random(0)
    waiting = [request(generator.choice([None, *range(50)])) for _ in range(2000)]
    for one in waiting:
        deadlines.add(one)
    left = set(generator.sample(waiting, 1700))
    for one in left:
        deadlines.discard(one)
    for now in (-1, 10, 10, 30, 49):
        due = list(deadlines.pop_due(now))
        want = [one for one in waiting if one.deadline is not None and one.deadline <= now and one not in left]
        assert sorted(map(id, due)) == sorted(map(id, want))
        assert [one.deadline for one in due] == sorted(one.deadline for one in want)
        left.update(due)
    assert len(deadlines) == 0


def test_those_that_left_are_forgotten():
    """However many come and go before their deadline, only those that are there take space."""
    deadlines = Deadlines()
    for _ in range(10_000):
        one = request(1e9)
        deadlines.add(one)
        deadlines.discard(one)
    assert len(deadlines._heap) < 100


def test_asking_costs_nothing():
    """A question looks at the earliest deadline only."""

    class Counting(float):
        asked = 0

        def __le__(self, other):
            Counting.asked += 1
            return float.__le__(self, other)

    deadlines = Deadlines()
    for i in range(1000):
        deadlines.add(request(Counting(i + 1)))
    Counting.asked = 0
    assert list(deadlines.pop_due(0.0)) == []
    assert Counting.asked == 1
