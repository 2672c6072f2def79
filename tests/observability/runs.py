"""Runs of a batcher with every kind of end, on a clock of their own."""

from paged_cache.observability import ChromeTrace
from tests.batching.alone import prompt
from tests.batching.faults import GREEDY, run, submit_all


class Clock:
    """Goes on by a little whenever it is read, and by more when it is told to."""

    def __init__(self, tick=0.001):
        self.now, self.tick = 100.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def run_with_preemptions(batcher, count=5):
    """Outputs of requests that said they would be short and were not; needs a pool of 14 blocks of 4 tokens."""
    handles = submit_all(batcher, [prompt(9, i) for i in range(count)], max_new_tokens=16, expected_tokens=1)
    outputs = run(batcher, handles)
    assert batcher.stats().num_preemptions > 0, "this is about requests that were preempted"
    return outputs


def run_to_every_end(batcher, clock):
    """Outputs that ended by "length", "stop", "timeout", "abort", "error" and "rejected", in this order."""
    length = batcher.submit(prompt(7), **GREEDY)
    run(batcher)
    stop = batcher.submit(prompt(7), **{**GREEDY, "eos_token_id": length.result(timeout=0).generated_tokens[2]})
    run(batcher)
    timeout = batcher.submit(prompt(5), **GREEDY, timeout=1)
    clock.now += 2
    run(batcher)
    abort = batcher.submit(prompt(5), **GREEDY)
    batcher.step()
    abort.cancel()
    error = batcher.submit(prompt(5), **GREEDY, streamer=Failing())
    run(batcher)
    rejected = batcher.submit(prompt(5), **{**GREEDY, "max_new_tokens": 5000})
    handles = [length, stop, timeout, abort, error, rejected]
    outputs = [handle.result(timeout=0) for handle in handles]
    reasons = [output.finish_reason for output in outputs]
    assert reasons == ["length", "stop", "timeout", "abort", "error", "rejected"]
    return outputs


class Failing:
    """A streamer that raises at the prompt."""

    def put(self, value):
        raise ValueError("no")

    def end(self):
        pass


def of_kind(trace: ChromeTrace, kind):
    """The events of one type."""
    return [event for event in trace.events if type(event) is kind]
