"""Numbers of requests and of the batcher, on a clock that is set by hand."""

import pytest

from tests.batching.alone import prompt
from tests.batching.faults import GREEDY, PROMPTS, Streamer, batching, run, submit_all

pytestmark = pytest.mark.timeout(30)


class Clock:
    """Stands still between steps."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_metrics_of_a_request():
    """Waiting, first token, time per token and all of it are what the clock said."""
    clock = Clock()
    with batching(max_num_seqs=1, policy="fcfs", clock=clock) as batcher:
        first = batcher.submit(PROMPTS[0], **GREEDY)  # six tokens
        clock.now += 3
        second = batcher.submit(PROMPTS[1], **{**GREEDY, "max_new_tokens": 1})
        for _ in range(7):
            clock.now += 1
            batcher.step()
        one, other = first.result(timeout=0).metrics, second.result(timeout=0).metrics
    assert (one.arrival_time, one.queue_time, one.ttft, one.tpot, one.e2e_latency) == (100, 4, 4, 1, 9)
    assert (other.arrival_time, other.queue_time, other.ttft, other.tpot, other.e2e_latency) == (103, 7, 7, None, 7)
    assert one.num_preemptions == other.num_preemptions == 0


def test_metrics_of_what_did_not_come_to_its_end():
    """Times that a request did not come to are None."""
    clock = Clock()
    with batching(max_num_seqs=1, max_queue_size=1, clock=clock) as batcher:
        waiting = batcher.submit(PROMPTS[0], **GREEDY)
        rejected = batcher.submit(PROMPTS[1], **GREEDY).result(timeout=0).metrics
        clock.now += 2
        waiting.cancel()
        cancelled = waiting.result(timeout=0).metrics
        failed = run(batcher, [batcher.submit(PROMPTS[0], **GREEDY, streamer=Streamer(0))])[0].metrics
    assert (rejected.queue_time, rejected.ttft, rejected.tpot, rejected.e2e_latency) == (None, None, None, 0)
    assert (cancelled.queue_time, cancelled.ttft, cancelled.tpot, cancelled.e2e_latency) == (None, None, None, 2)
    assert (failed.queue_time, failed.ttft, failed.e2e_latency) == (0, None, 0)


def test_state_of_a_batcher():
    """Waiting, running, steps, tokens, blocks and ends are counted."""
    with batching(max_num_seqs=2, max_num_batched_tokens=16, num_blocks=50) as batcher:
        stats = batcher.stats()
        assert (stats.forward, stats.policy, stats.num_blocks) == ("packed", "sjf", 50)
        assert (stats.num_waiting, stats.num_running, stats.num_steps, stats.blocks_in_use) == (0, 0, 0, 0)
        assert stats.finished == {}
        handles = submit_all(batcher, [prompt(5, 1), prompt(7, 2), prompt(9, 3)])
        assert batcher.stats().num_waiting == 3
        batcher.step()
        stats = batcher.stats()
        assert (stats.num_waiting, stats.num_running, stats.num_running_seqs, stats.num_steps) == (1, 2, 2, 1)
        assert 12 <= stats.num_batched_tokens <= 16
        assert 3 <= stats.blocks_in_use <= 5
        run(batcher, handles)
        stats = batcher.stats()
        assert (stats.num_waiting, stats.num_running, stats.num_running_seqs) == (0, 0, 0)
        assert stats.finished == {"length": 3}
        assert stats.num_generated_tokens == 18
        assert stats.num_batched_tokens == 5 + 7 + 9 + 3 * 5
        assert stats.blocks_in_use == 0
        assert 4 <= stats.peak_blocks_in_use <= 50
        assert 0 < stats.forward_seconds <= stats.step_seconds
        assert (stats.prefix_queries, stats.prefix_hits) == (21, 0)


def test_prefix_hits():
    """Tokens of prompts that the pool had are counted, for the request and in all; another salt shares nothing."""
    ids = prompt(21)
    with batching(block_size=4) as batcher:
        outputs = [run(batcher, submit_all(batcher, [ids], cache_salt=salt))[0] for salt in ("a", "a", "b")]
        assert [output.cached_tokens for output in outputs] == [0, 20, 0]
        assert batcher.stats().prefix_hits == 20
        assert batcher.stats().prefix_queries == 63
        assert outputs[0].generated_tokens == outputs[1].generated_tokens == outputs[2].generated_tokens


def test_priority():
    """Lower priorities run first, whatever came first."""
    with batching(max_num_seqs=1) as batcher:
        ends = []
        for name, priority in (("late", 1), ("usual", 0), ("soon", -1)):
            handle = batcher.submit(PROMPTS[0], **GREEDY, priority=priority)
            handle.add_listener(lambda token, name=name: ends.append(name) if token is None else None)
        run(batcher)
        assert ends == ["soon", "usual", "late"]


def test_step_says_whether_requests_are_left():
    """True until the last request is over, and False where there is nothing to do."""
    with batching() as batcher:
        assert batcher.step() is False
        batcher.submit(PROMPTS[0], **{**GREEDY, "max_new_tokens": 3})
        assert [batcher.step() for _ in range(4)] == [True, True, False, False]


def test_a_batcher_on_the_screen():
    """Its model, and what its requests are doing."""
    with batching(max_num_seqs=1) as batcher:
        submit_all(batcher, PROMPTS[:2], **GREEDY)
        batcher.step()
        busy = repr(batcher)
        while batcher.step():
            pass
        done = repr(batcher)
    assert busy == "ContinuousBatcher(LlamaForCausalLM, 1 running, 1 waiting)"
    assert done == "ContinuousBatcher(LlamaForCausalLM, 0 running, 0 waiting, 2 length)"
    assert repr(batcher) == "ContinuousBatcher(LlamaForCausalLM, closed)"
