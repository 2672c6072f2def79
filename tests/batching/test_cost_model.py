"""Step times are fitted to what was measured."""

import random

import pytest

from paged_cache.batching.cost_model import START, StepCost


def feed(cost, true, rng, count=400, noise=0.0):
    a, b, c = true
    for _ in range(count):
        tokens, kv = rng.choice([16, 16, 200, 1024]), rng.randint(100, 50_000)
        cost.observe((a + b * tokens + c * kv) * (1 + rng.uniform(-noise, noise)), tokens, kv)


@pytest.mark.parametrize("true", [(0.015, 4e-5, 4e-8), (0.3, 0.004, 1e-6), (0.001, 1e-6, 5e-9), (0.005, 4e-4, 0.0)])
def test_coefficients_are_found(true):
    """On machines a hundred times faster and slower than the start, times come out right within 3 %."""
    cost = StepCost()
    feed(cost, true, random.Random(0))

    for tokens, kv in [(16, 1000), (16, 40_000), (1024, 20_000)]:
        assert cost.seconds(tokens, kv) == pytest.approx(true[0] + true[1] * tokens + true[2] * kv, rel=0.03)


def test_noise_makes_no_coefficient_negative():
    """Half of the time up or down: still within a quarter, and nothing below zero."""
    cost = StepCost()
    feed(cost, (0.01, 1e-5, 0.0), random.Random(1), noise=0.5)

    assert min(cost.coefficients) >= 0
    assert cost.seconds(16, 1000) == pytest.approx(0.0102, rel=0.25)


def test_a_step_that_compiles_does_not_matter():
    """One step of a minute among steps of 10 ms moves nothing by more than 10 %."""
    cost = StepCost()
    cost.observe(60.0, 1024, 1024)
    feed(cost, (0.01, 1e-5, 1e-8), random.Random(2), count=100)
    cost.observe(60.0, 16, 1024)

    assert cost.seconds(16, 1000) == pytest.approx(0.01017, rel=0.1)


def test_steps_that_are_all_alike_scale_the_start():
    """What cannot be told apart keeps its share; a machine that changes is followed."""
    cost = StepCost()
    assert cost.coefficients == START
    for factor in (10, 0.5):
        seconds = factor * StepCost().seconds(16, 8000)
        for _ in range(2000):
            cost.observe(seconds, 16, 8000)
        assert cost.seconds(16, 8000) == pytest.approx(seconds, rel=0.01)
        assert cost.coefficients[1] == pytest.approx(factor * START[1], rel=0.5)


def test_work_grows_with_all_that_costs():
    """More prompt, more output, more rows: more seconds of a slot; alone on a machine of one slot it is the time it takes."""
    cost = StepCost()
    base = cost.work(100, 100, 1, 16, 1024)

    assert base < cost.work(200, 100, 1, 16, 1024) < cost.work(200, 200, 1, 16, 1024) < cost.work(200, 200, 2, 16, 1024)
    one = sum(cost.seconds(1, 1024 + i) for i in range(50)) + cost.seconds(1024, 0)
    assert cost.work(1024, 50, 1, 1, 1024) == pytest.approx(one, rel=0.01)


def test_impossible_times_are_ignored():
    """A clock that stands still teaches nothing."""
    cost = StepCost()
    cost.observe(0.0, 5, 5)
    assert cost.coefficients == START
