"""Keys: what each policy promises about them."""

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from paged_cache.batching.policy import Outlook, ShortestJobFirst, make_policy
from paged_cache.batching.request import Request
from paged_cache.errors import InvalidRequestError


def key(policy, time=0.0, work=1.0, mean_work=1.0, backlog=0.0, trust=1.0):
    request = Request("", range(1), 1, arrival_time=time, work=work)
    return policy.key(request, Outlook(time, mean_work, backlog, trust))


ARRIVALS = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 100), st.floats(0, 50)), min_size=2, max_size=30)


@given(ARRIVALS)
def test_nobody_who_comes_a_window_later_is_first(arrivals):
    """A request's key lies between its arrival and its window's end; for the heaviest ones it is the end."""
    policy, time = ShortestJobFirst(), 0.0
    for gap, work, backlog in arrivals:
        time += gap
        chosen = key(policy, time, work, 1.0, backlog)
        assert time <= chosen <= time + policy._window
        assert policy._window >= policy.patience * (1 + backlog)


@given(ARRIVALS, st.floats(0.1, 30))
def test_equals_keep_their_order(arrivals, work):
    """Of two requests with the same work, the one that came first has the smaller key, whatever the backlog was."""
    policy, time, keys = ShortestJobFirst(), 0.0, []
    for gap, _, backlog in arrivals:
        time += gap
        keys.append(key(policy, time, work, 1.0, backlog))

    assert all(left <= right + 1e-9 for left, right in pairwise(keys))


@given(st.floats(0, 100), st.floats(0, 100))
def test_less_work_is_sooner(left, right):
    """At one time, keys are in the order of the works."""
    policy = ShortestJobFirst()
    keys = [key(policy, work=work) for work in sorted([left, right])]

    assert keys[0] <= keys[1]
    assert key(policy, work=0.1) < key(policy, work=1.0) < key(policy, work=5.0)


def test_worthless_predictions_are_not_followed():
    """Then it is first come, first served."""
    policy = ShortestJobFirst()
    assert key(policy, 7.0, work=50.0, trust=0.0) == 7.0
    assert 7.0 < key(policy, 7.0, work=50.0, trust=0.5) < key(policy, 7.0, work=50.0)


def test_the_others():
    """Arrival for fcfs, work for plain sjf, lanes of works for hrrn, which prefers the largest ratio of wait to work."""
    assert key(make_policy("fcfs"), 3.0, work=9.0) == 3.0
    assert key(make_policy("sjf-no-aging"), 3.0, work=9.0) == 9.0
    assert make_policy("sjf-no-aging").max_displacement == math.inf
    hrrn = make_policy("hrrn")
    lanes = [hrrn.lane(Request("", range(1), 1, work=work)) for work in (1.0, 1.05, 4.0, 0.0)]
    assert lanes[0] == lanes[1] == 1.0
    assert lanes[2] == 4.0
    assert hrrn.rank(0.0, 1.0, 5.0) < hrrn.rank(0.0, 4.0, 5.0) < hrrn.rank(4.9, 1.0, 5.0)


def test_names():
    """Each name makes a new object; an object is taken as it is; others are refused with the list."""
    assert make_policy("sjf") is not make_policy("sjf")
    own = ShortestJobFirst(patience=2)
    assert make_policy(own) is own
    with pytest.raises(
        InvalidRequestError, match="'srpt' is unknown: use one of 'sjf', 'fcfs', 'sjf-no-aging', 'hrrn'"
    ):
        make_policy("srpt")
    with pytest.raises(InvalidRequestError):
        make_policy(None)
