"""Lengths learned from history, and whether what was learned is worth anything."""

import math
import random

import pytest

from paged_cache.batching.predictor import History, LengthPredictor, RankCheck, spearman
from paged_cache.batching.request import Request


def request(num_prompt=100, limit=1000, **options):
    return Request("", range(num_prompt), limit, **options)


def test_without_history_the_limit_is_expected():
    """The caller's own prediction wins, but never beyond the limit."""
    predictor = LengthPredictor()

    assert predictor.predict(request(limit=77)) == 77
    assert predictor.predict(request(expected_tokens=12.5)) == 12.5
    assert predictor.predict(request(limit=10, expected_tokens=12.5)) == 10
    assert predictor.predict(request(limit=10, expected_tokens=-3)) == 1


def test_tenants_and_prompt_lengths_are_told_apart():
    """Each tenant's lengths are found; unknown tenants get the mean of all; nothing exceeds the limit."""
    predictor = LengthPredictor()
    for _ in range(100):
        predictor.observe(request(100, tenant="a"), 10)
        predictor.observe(request(100, tenant="b"), 300)
        predictor.observe(request(1000, tenant="b"), 30)

    assert predictor.predict(request(100, tenant="a")) == pytest.approx(10, rel=0.2)
    assert predictor.predict(request(105, tenant="b")) == pytest.approx(300, rel=0.2)
    assert predictor.predict(request(1000, tenant="b")) == pytest.approx(30, rel=0.5)
    assert 30 < predictor.predict(request(tenant="c")) < 300
    assert predictor.predict(request(100, limit=50, tenant="b")) <= 50


def test_one_value_does_not_make_a_mean():
    """Few requests of a tenant move its prediction only part of the way from that of all."""
    predictor = LengthPredictor()
    for _ in range(100):
        predictor.observe(request(tenant="many"), 100)
    predictor.observe(request(tenant="one"), 900)

    assert 200 < predictor.predict(request(tenant="one")) < 700


def test_what_changed_is_forgotten():
    """After some hundred requests only the new lengths count."""
    predictor = LengthPredictor()
    for length in [500] * 300 + [20] * 400:
        predictor.observe(request(), length)

    assert predictor.predict(request()) == pytest.approx(20, rel=0.05)


def test_limits_are_believed_where_they_are_right():
    """Callers who ask for just what they need are predicted by what they ask for."""
    predictor, rng = LengthPredictor(), random.Random(0)
    for _ in range(200):
        limit = rng.randint(1, 1000)
        predictor.observe(request(limit=limit), limit)

    assert predictor.predict(request(limit=600)) == pytest.approx(600, rel=0.01)
    assert predictor.predict(request(limit=5)) == pytest.approx(5, rel=0.01)


def test_memory_is_bounded():
    """Tenants that were not seen for long are forgotten; a tenant has few buckets."""
    history = History(max_tenants=10)
    for i in range(1000):
        history.add(i % 25, i + 1, 1.0)

    assert len(history) == 10
    assert max(len(means) for means in history._tenants.values()) < 60


@pytest.mark.parametrize(("right", "expected"), [([1, 2, 3, 4], 1), ([4, 3, 2, 1], -1), ([5, 5, 5, 5], 0)])
def test_spearman(right, expected):
    """1 for the same order, -1 for the reverse, 0 where there is none."""
    assert spearman([10, 20, 30, 400], right) == pytest.approx(expected)


def test_spearman_shares_ranks():
    """Equal values have their mean rank: ranks 0.5, 0.5, 2 against 0, 1, 2."""
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_the_check_finds_out():
    """Good predictions stay trusted; random and reversed ones are not, and are again when they get better."""
    rng, check = random.Random(0), RankCheck()
    assert check.trust == 1
    for predict, verdict in [(lambda x: x, 1), (lambda x: -x, 0), (lambda x: x + rng.random(), 1)]:
        for _ in range(300):
            actual = rng.random()
            check.observe(predict(actual), actual)
        assert check.trust == verdict
    for _ in range(2000):
        check.observe(0.0, rng.random())
    assert check.trust == 0
