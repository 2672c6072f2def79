"""The log line: when it comes, at which level, and what its numbers are, on a clock that is set by hand."""

import logging

import pytest

from paged_cache import ContinuousBatcher, InvalidRequestError
from paged_cache.observability import Idle, Scheduled, StatsLogger, StepDone
from tests.batching.alone import prompt, tiny
from tests.batching.faults import GREEDY, batching, run, submit_all, wait_for
from tests.models import poisoned_pool

pytestmark = pytest.mark.timeout(30)


class Still:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines(caplog):
    """Level and text of each line so far."""
    caplog.set_level(logging.DEBUG, "paged_cache")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.getMessage().startswith("Avg prompt")]


def step(start, time, prompts=0, generated=0):
    """A step with so many tokens; 3 requests run, 2 wait, a quarter of the blocks is in use."""
    return StepDone(time, start, prompts + generated, prompts, 0, generated, 1, 3, 2, 25, 100)


def text(prompts, generated, running, waiting, usage, rate):
    """A line."""
    return (
        f"Avg prompt throughput: {prompts} tokens/s, Avg generation throughput: {generated} tokens/s, "
        f"Running: {running} reqs, Waiting: {waiting} reqs, KV cache usage: {usage}%, Prefix cache hit rate: {rate}%"
    )


def test_line_of_a_batcher(lines):
    """One behind the first step that ends five seconds on: tokens per second, the queue, the pool, the recent hit rate."""
    clock = Still()
    with batching(max_num_seqs=2, num_blocks=50, clock=clock, log_stats=True) as batcher:
        submit_all(batcher, [prompt(9, 1), prompt(9, 2), prompt(9, 3)])
        for clock.now in (1.0, 2.0, 5.9):
            batcher.step()
        assert not lines()
        clock.now = 6.0
        batcher.step()
        stats = batcher.stats()
        assert (stats.num_running, stats.num_waiting) == (2, 1)
        usage = 100 * stats.blocks_in_use / 50
        assert lines() == [("INFO", text("3.6", "1.6", 2, 1, f"{usage:.1f}", "0.0"))]  # 18 and 8 tokens
        run(batcher)
        assert len(lines()) == 1


def test_recomputed_tokens_do_not_count(lines):
    """Prompt throughput is that of prompts computed for the first time, also where requests were preempted."""
    clock = Still()
    with batching(num_blocks=14, max_num_seqs=4, clock=clock, log_stats=5) as batcher:
        submit_all(batcher, [prompt(9, i) for i in range(5)], max_new_tokens=16, expected_tokens=1)
        run(batcher)
        assert batcher.stats().num_preemptions > 0
        clock.now = 4.9
        batcher.submit(prompt(10, 9), **{**GREEDY, "max_new_tokens": 2})
        batcher.step()
        assert not lines()
        clock.now = 5.5
        batcher.step()
    ((_, line),) = lines()
    assert f"prompt throughput: {(5 * 9 + 10) / 5.5:.1f} tokens/s" in line
    assert f"generation throughput: {(5 * 16 + 2) / 5.5:.1f} tokens/s" in line


def test_names(lines, caplog):
    """Lines of several batchers are told apart by the names that they were given; a name is no format."""
    for name in ("chat", "100%s"):
        StatsLogger(5.0, name=name)(step(0, 6, generated=60))
    named = [r.getMessage() for r in caplog.records]
    line = text("0.0", "10.0", 3, 2, "25.0", "0.0")
    assert named == [f"chat: {line}", f"100%s: {line}"]
    assert not lines()  # those without a name


def test_levels(lines):
    """INFO while there are tokens and once more, DEBUG from the second idle interval on."""
    logger = StatsLogger(5.0)
    logger(step(0, 1, prompts=100, generated=10))
    for time in (2, 6, 8, 11, 16):
        logger(Idle(time, 5, 100))
    logger(step(16, 21, generated=50))
    assert [level for level, _ in lines()] == ["INFO", "INFO", "DEBUG", "INFO"]
    assert lines()[0][1] == text("16.7", "1.7", 0, 0, "5.0", "0.0")
    assert lines()[1][1] == text("0.0", "0.0", 0, 0, "5.0", "0.0")
    assert lines()[3][1] == text("0.0", "10.0", 3, 2, "25.0", "0.0")


def test_pauses_do_not_count(lines):
    """After a pause that nobody logged in, what was before has a line of its own, over the time that it took."""
    logger = StatsLogger(5.0)
    logger(step(0, 2, generated=20))
    logger(step(100, 104, generated=8))
    assert [line for _, line in lines()] == [text("0.0", "10.0", 3, 2, "25.0", "0.0")]
    logger(step(104, 105, generated=2))
    assert lines()[1][1] == text("0.0", "2.0", 3, 2, "25.0", "0.0")


def test_hit_rate_is_recent(lines):
    """The last thousand requests count; who runs again after a preemption does not."""
    logger = StatsLogger(5.0)
    for _ in range(1000):
        logger(Scheduled(0, "old", 10, 10, True))
    for _ in range(750):
        logger(Scheduled(0, "new", 10, 0, True))
    logger(Scheduled(0, "again", 1000, 1000, False))
    logger(step(0, 5, generated=1))
    assert lines()[0][1].endswith("Prefix cache hit rate: 25.0%")


def test_thread_of_a_batcher(lines):
    """Where a thread does the steps, lines come while there is nothing to do as well."""
    with batching(log_stats=0.01) as batcher:
        batcher.start()
        for handle in submit_all(batcher):
            handle.result(timeout=20)
        wait_for(lambda: any(level == "DEBUG" for level, _ in lines()), "a line of an idle batcher")
    assert lines()[0][0] == "INFO"
    assert any("Running: 0 reqs" in line for _, line in lines())


@pytest.mark.parametrize("wrong", [-1, 0.0, "often", float("nan")])
def test_intervals_that_make_no_sense(wrong):
    """They are refused by name and nothing is patched."""
    of = tiny("llama")
    with pytest.raises(InvalidRequestError, match="log_stats="):
        ContinuousBatcher(of, poisoned_pool(of), log_stats=wrong)


def test_off_by_default(lines):
    """No line without being asked, however long it takes."""
    clock = Still()
    with batching(clock=clock) as batcher:
        submit_all(batcher)
        for clock.now in range(0, 100, 10):
            batcher.step()
    assert not lines()
