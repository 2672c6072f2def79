"""Events: what observers hear, when, and that nobody suffers from them."""

import asyncio
import logging
import sys
import threading
import time
from itertools import pairwise

import pytest

from paged_cache import AsyncContinuousBatcher, ContinuousBatcher, InvalidRequestError, PagedCacheError
from paged_cache.batching.options import RequestOptions
from paged_cache.batching.policy import Policy
from paged_cache.batching.reporting import Reports
from paged_cache.observability import (
    ChromeTrace,
    Finished,
    Generated,
    Idle,
    Preempted,
    Prefilled,
    Queued,
    Scheduled,
    StepDone,
)
from tests.adapters.zoo import ZOOS, make, mixed
from tests.batching.alone import prompt, tiny
from tests.batching.faults import (
    GREEDY,
    PATIENCE,
    PROMPTS,
    batching,
    expected,
    in_threads,
    run,
    submit_all,
    tokens,
    wait_for,
)
from tests.models import poisoned_pool
from tests.observability.runs import Clock, Failing, of_kind, run_to_every_end, run_with_preemptions

pytestmark = pytest.mark.timeout(30)


def kinds(events):
    """Their types."""
    return [type(event) for event in events]


def test_life_of_a_request():
    """Queued, scheduled, prefilled in pieces, a token per step, finished: each once, in order, on the batcher's clock."""
    clock = Clock()
    with batching(max_num_batched_tokens=16, clock=clock) as batcher:
        trace = batcher.observe(ChromeTrace())
        handle = batcher.submit(prompt(21), **GREEDY, request_id="one", priority=3)
        (output,) = run(batcher, [handle])
    events = trace.for_request("one")
    assert kinds(events) == [Queued, Scheduled, Prefilled, Prefilled, *[Generated] * 6, Finished]
    queued, scheduled, first, second, *generated, finished = events
    assert (queued.num_prompt_tokens, queued.max_new_tokens, queued.priority) == (21, 6, 3)
    assert (scheduled.num_tokens, scheduled.num_cached_tokens, scheduled.is_first) == (21, 0, True)
    assert [(e.position, e.num_tokens, e.is_again) for e in (first, second)] == [(0, 16, False), (16, 5, False)]
    assert [e.is_first for e in generated] == [True] + [False] * 5
    assert generated[0].seconds == pytest.approx(output.metrics.ttft)
    assert sum(e.seconds for e in generated[1:]) / 5 == pytest.approx(output.metrics.tpot)
    assert finished.decode_time == pytest.approx(5 * output.metrics.tpot)
    assert (finished.finish_reason, finished.num_generated_tokens, finished.metrics) == ("length", 6, output.metrics)
    times = [event.time for event in events]
    assert times == sorted(times)
    assert 100 < times[0] < times[-1] <= clock.now


def test_steps_add_up():
    """Tokens of all steps are those of the statistics; prompt tokens count once, cached ones apart."""
    with batching(max_num_batched_tokens=16) as batcher:
        trace = batcher.observe(ChromeTrace())
        run(batcher, submit_all(batcher))
        outputs = run(batcher, submit_all(batcher))  # the same again: much of it is cached
        stats = batcher.stats()
    steps = of_kind(trace, StepDone)
    cached = sum(output.cached_tokens for output in outputs)
    assert cached > 0
    assert len(steps) == stats.num_steps
    assert sum(step.num_tokens for step in steps) == stats.num_batched_tokens
    assert sum(step.num_generated_tokens for step in steps) == stats.num_generated_tokens
    assert sum(step.num_cached_tokens for step in steps) == cached
    assert sum(step.num_prompt_tokens for step in steps) == 2 * sum(map(len, PROMPTS)) - cached
    assert all(earlier.time <= later.start for earlier, later in pairwise(steps))
    assert (steps[-1].num_running, steps[-1].num_waiting, steps[-1].blocks_in_use) == (0, 0, 0)
    assert max(step.blocks_in_use for step in steps) == stats.peak_blocks_in_use


def test_preemptions_show():
    """As many as there were; prompts of preempted requests count once, and what is computed again is marked."""
    with batching(num_blocks=14, max_num_seqs=4) as batcher:
        trace = batcher.observe(ChromeTrace())
        outputs = run_with_preemptions(batcher)
    preempted = of_kind(trace, Preempted)
    assert len(preempted) == sum(output.metrics.num_preemptions for output in outputs)
    assert len([event for event in of_kind(trace, Scheduled) if not event.is_first]) == len(preempted)
    assert [event.request_id for event in of_kind(trace, Prefilled) if event.is_again]
    assert sum(step.num_prompt_tokens for step in of_kind(trace, StepDone)) == 5 * 9
    assert tokens(outputs) == expected(*(prompt(9, i) for i in range(5)), max_new_tokens=16)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True, "seed": 1}])
def test_several_sequences(name, options):
    """Tokens of all sequences count, and one piece of work of a request in a step is one event."""
    with batching(name, num_blocks=600) as batcher:
        trace = batcher.observe(ChromeTrace())
        run(batcher, [batcher.submit(prompt(9), **{**GREEDY, **options}, request_id="all")])
        stats = batcher.stats()
    events = trace.for_request("all")
    generated = [event for event in events if type(event) is Generated]
    assert sum(event.num_tokens for event in generated) == stats.num_generated_tokens
    assert {event.num_tokens for event in generated} == {3}
    assert kinds(events)[:4] == [Queued, Scheduled, Prefilled, Generated]
    assert kinds(events).count(Prefilled) == 1


def test_every_end():
    """One `Finished` per request, with its reason; the only event of a rejected one."""
    clock = Clock()
    with batching(clock=clock) as batcher:
        trace = batcher.observe(ChromeTrace())
        outputs = run_to_every_end(batcher, clock)
    for output in outputs:
        events = trace.for_request(output.request_id)
        assert kinds(events).count(Finished) == 1
        assert type(events[-1]) is Finished
        assert events[-1].finish_reason == output.finish_reason
        assert (events[-1].error is None) == (output.error is None)
    assert kinds(trace.for_request(outputs[-1].request_id)) == [Finished]


def test_nobody_there_nothing_done(monkeypatch):
    """Without observers none of the reports' methods that make events is called, and no event is made."""
    called = []
    for name in ("queued", "planned", "preempted", "computed", "generated", "finished", "step_done", "idle", "tell"):
        monkeypatch.setattr(Reports, name, lambda *_, name=name: called.append(name))
    clock = Clock()
    with batching(num_blocks=40, clock=clock) as batcher:
        run_to_every_end(batcher, clock)
        run(batcher, submit_all(batcher))
    with batching(num_blocks=14, max_num_seqs=4) as batcher:
        run_with_preemptions(batcher)

    assert called == []


def lines_per_step(num_rows, *observers):
    """Lines of the modules that report which run in a step in which so many sequences decode."""
    ran = []

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(("reporting.py", "events.py", "stats_logger.py")):
            return None
        if event == "line":
            ran.append((frame.f_code.co_name, frame.f_lineno))
        return trace

    with batching(max_num_seqs=8, observers=observers) as batcher:
        submit_all(batcher, [prompt(5, i) for i in range(num_rows)], max_new_tokens=12)
        for _ in range(4):
            batcher.step()
        sys.settrace(trace)
        try:
            batcher.step()
        finally:
            sys.settrace(None)
        assert batcher.stats().num_running == num_rows
    return ran


def test_off_is_free():
    """Nothing attached: a step asks once who is calling, whatever it decodes; with an observer there is work per sequence."""
    assert [name for name, _ in lines_per_step(4)] == [name for name, _ in lines_per_step(8)] == ["is_telling"]
    assert 1 < len(lines_per_step(4, lambda event: None)) < len(lines_per_step(8, lambda event: None))


def test_observer_that_raises(caplog):
    """It is named in the log once and called no more; requests and other observers go on."""
    calls = []

    def failing(event):
        calls.append(event)
        raise ValueError("no")

    with batching(observers=[failing]) as batcher, caplog.at_level(logging.ERROR, "paged_cache"):
        trace = batcher.observe(ChromeTrace())
        outputs = run(batcher, submit_all(batcher))
    assert tokens(outputs) == expected()
    assert len(calls) == 1
    (record,) = [record for record in caplog.records if "is called no more" in record.getMessage()]
    assert "failing" in record.getMessage()
    assert len(of_kind(trace, Finished)) == 5


def test_observers_come_and_go():
    """One that is taken back hears nothing of what comes then; one that comes late hears what comes then."""
    with batching() as batcher:
        early, late = batcher.observe(ChromeTrace()), ChromeTrace()
        run(batcher, submit_all(batcher, PROMPTS[:1]))
        batcher.stop_observing(early)
        batcher.observe(late)
        run(batcher, submit_all(batcher, PROMPTS[1:]))
    assert [len(of_kind(trace, Finished)) for trace in (early, late)] == [1, 4]


@pytest.mark.parametrize("observers", [["no"], 3, [None]])
def test_what_is_no_observer(observers):
    """It is refused by name, before anything is done."""
    of = tiny("llama")
    with pytest.raises(InvalidRequestError, match=r"no|3|None"):
        AsyncContinuousBatcher(of, poisoned_pool(of), observers=observers)
    with batching() as batcher, pytest.raises(InvalidRequestError, match="'no'"):
        batcher.observe("no")


def test_observers_may_submit_and_cancel_but_not_wait():
    """An observer is outside of the step: it hands requests in and ends others; waiting is refused."""
    refusals, more = [], []
    with batching() as batcher:

        def observer(event):
            if type(event) is Generated and event.request_id == "first" and not more:
                more.append(batcher.submit(PROMPTS[1], **GREEDY))
                victim.cancel()
                assert not batcher._loop.is_under_way(victim.request_id)
                for wait in (batcher.step, more[0].result, batcher.close):
                    with pytest.raises(PagedCacheError) as error:
                        wait()
                    refusals.append(str(error.value))

        batcher.observe(observer)
        first = batcher.submit(PROMPTS[0], **GREEDY, request_id="first")
        victim = batcher.submit(PROMPTS[2], **GREEDY)
        outputs = run(batcher, [first])
        outputs += [more[0].result(timeout=0), victim.result(timeout=0)]
    assert [output.finish_reason for output in outputs] == ["length", "length", "abort"]
    assert tokens(outputs[:2]) == expected()[:2]
    assert len(refusals) == 3
    assert all("observer" in text for text in refusals)


def test_no_lock_is_held():
    """While an observer takes its time, other threads hand requests in, cancel them, and hear that they are rejected."""
    told, released, is_released = threading.Event(), threading.Event(), []

    def slow(event):
        told.set()
        is_released.append(released.wait(5))

    with batching(observers=[slow]) as batcher:
        batcher.submit(PROMPTS[0], **GREEDY)
        stepper = threading.Thread(target=batcher.step)
        stepper.start()
        assert told.wait(PATIENCE)
        assert not batcher._loop._stepping.locked()
        handle = batcher.submit(PROMPTS[1], **GREEDY)
        assert batcher.stats().num_waiting == 1
        handle.cancel()
        rejected = batcher.submit(PROMPTS[1], **{**GREEDY, "max_new_tokens": 5000})
        assert not released.is_set()
        assert batcher.stats().num_waiting == 0
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.01)  # not before observers know
        released.set()
        assert handle.result(timeout=PATIENCE).finish_reason == "abort"
        assert rejected.result(timeout=PATIENCE).finish_reason == "rejected"
        stepper.join(PATIENCE)
        run(batcher)
    assert all(is_released), "nobody waited for the observer"


def test_one_at_a_time_from_any_thread():
    """With several threads stepping, no observer is called twice at once, and every request's events are in order."""
    busy, overlaps, calls = threading.Lock(), [], 0

    def alone(event):
        nonlocal calls
        if not busy.acquire(blocking=False):
            overlaps.append(event)
            return
        calls += 1
        time.sleep(0.001)
        busy.release()

    with batching(observers=[alone]) as batcher:
        trace = batcher.observe(ChromeTrace())
        handles = submit_all(batcher)

        def step():
            while any(not handle.done for handle in handles):
                batcher.step()

        in_threads(step, step, step, step)
    assert calls == len(trace) > 40
    assert not overlaps
    for event in of_kind(trace, Queued):
        events = trace.for_request(event.request_id)
        assert kinds(events)[0] is Queued
        assert kinds(events)[-1] is Finished
        assert [e.time for e in events] == sorted(e.time for e in events)


@pytest.mark.parametrize("reason", ["length", "error", "abort"])
def test_whoever_has_a_result_finds_it_told(reason):
    """In asyncio, handle and listeners hear of the end behind all observers, who know the step that it came in as well."""
    of, late = tiny("llama"), []

    async def main():
        async with AsyncContinuousBatcher(of, poisoned_pool(of)) as batcher:
            trace = batcher.observe(ChromeTrace())
            batcher.observe(lambda event: time.sleep(0.001))
            for i in range(20):
                streamer = Failing() if reason == "error" else None
                options = {**GREEDY, "max_new_tokens": 2, "streamer": streamer, "request_id": f"r{i}"}
                handle = await batcher.submit(PROMPTS[0], **options)
                if reason == "abort":
                    handle.cancel()
                output = await handle.result()
                assert output.finish_reason in (reason, "length")
                events = trace.for_request(f"r{i}")
                is_told = bool(events) and type(events[-1]) is Finished
                steps = of_kind(trace, StepDone)
                num_told = sum(step.num_generated_tokens for step in steps)
                if not is_told or num_told < sum(event.num_tokens for event in of_kind(trace, Generated)):
                    late.append(i)

    asyncio.run(main())
    assert not late


def test_observer_may_have_the_result_of_what_ends():
    """An observer that hears of an end asks the handle for the output."""
    heard = []

    def observer(event):
        if type(event) is Finished:
            heard.append(handle.result(timeout=0).finish_reason)

    with batching(observers=[observer]) as batcher:
        handle = batcher.submit(PROMPTS[0], **GREEDY)
        run(batcher)
    assert heard == ["length"]


def test_listener_may_have_the_result_of_what_ended():
    """A listener at the end of one request asks for another one that ended in the same step."""
    heard = []
    with batching(observers=[lambda event: None]) as batcher:
        handles = submit_all(batcher, [prompt(5, i) for i in range(3)])
        for handle, other in zip(handles, [*handles[1:], handles[0]], strict=True):
            handle.add_listener(
                lambda token, other=other: heard.append(other.result(timeout=0)) if token is None else None
            )
        outputs = run(batcher, handles)
    assert {output.request_id for output in heard} == {output.request_id for output in outputs}
    assert len(heard) == 3


def test_interrupt_in_an_observer():
    """Ctrl-C in one observer: the others hear of the event all the same, once, and no handle waits forever."""
    interrupts = iter([Generated, StepDone, Finished])
    following = next(interrupts)

    def interrupted(event):
        nonlocal following
        if type(event) is following:
            following = next(interrupts, None)
            raise KeyboardInterrupt

    with batching(observers=[interrupted]) as batcher:
        trace = batcher.observe(ChromeTrace())
        handles = submit_all(batcher, PROMPTS[:2])
        outputs = run(batcher, handles)
        stats = batcher.stats()
    assert following is None, "all interrupts came"
    assert tokens(outputs) == expected()[:2]
    assert sum(event.num_tokens for event in of_kind(trace, Generated)) == stats.num_generated_tokens
    assert len(of_kind(trace, StepDone)) == stats.num_steps
    assert len(of_kind(trace, Finished)) == 2


def test_interrupt_in_an_observer_of_a_thread():
    """The batcher's thread tells the rest at once: who waits for the last request does not wait for another."""

    def interrupted(event):
        if type(event) is Finished:
            raise KeyboardInterrupt

    with batching(observers=[interrupted]) as batcher:
        trace = batcher.observe(ChromeTrace())
        batcher.start()
        handle = batcher.submit(PROMPTS[0], **GREEDY)
        assert handle.result(timeout=PATIENCE).finish_reason == "length"
        assert len(of_kind(trace, Finished)) == 1


def test_bound_methods_are_taken_back():
    """`stop_observing(object.method)` is the same method of the same object, and not of one that merely looks alike."""

    class Counting:
        count = 0

        def hear(self, event):
            self.count += 1

    gone, other = Counting(), Counting()
    with batching(observers=[gone.hear, other.hear]) as batcher:
        batcher.stop_observing(gone.hear)
        run(batcher, submit_all(batcher, PROMPTS[:1]))
    assert gone.count == 0
    assert other.count > 0


def test_what_comes_of_slow_choices():
    """A processor that takes its time delays the first token and each one behind it, and not the forward."""

    class Slow:
        def __call__(self, ids, scores):
            clock.now += 10
            return scores

    clock = Clock()
    with batching(clock=clock) as batcher:
        trace = batcher.observe(ChromeTrace())
        handle = batcher.submit(PROMPTS[0], **GREEDY, logits_processor=[Slow()])
        (output,) = run(batcher, [handle])
    assert output.metrics.ttft >= 10
    assert output.metrics.tpot >= 10
    assert all(event.seconds >= 10 for event in of_kind(trace, Generated))
    (prefilled,) = of_kind(trace, Prefilled)
    assert prefilled.time - prefilled.start < 1
    (finished,) = of_kind(trace, Finished)
    assert finished.decode_time >= 50


def test_beam_search_has_its_times():
    """The time of a beam search's tokens is behind its turn as well."""

    class Slow:
        def __call__(self, ids, scores):
            clock.now += 10
            return scores

    clock = Clock()
    with batching(clock=clock, num_blocks=600) as batcher:
        handle = batcher.submit(PROMPTS[0], **GREEDY, num_beams=2, logits_processor=[Slow()])
        (output,) = run(batcher, [handle])
    assert output.metrics.ttft >= 10


def test_step_that_fails_behind_its_forward():
    """What it computed is a step of its own, and not part of the next one."""

    class Interrupting:
        calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return scores

    with batching() as batcher:
        trace = batcher.observe(ChromeTrace())
        handle = batcher.submit(PROMPTS[1], **GREEDY, logits_processor=[Interrupting()])
        (output,) = run(batcher, [handle])
        stats = batcher.stats()
    steps = of_kind(trace, StepDone)
    assert output.generated_tokens == expected(PROMPTS[1])[0]
    assert steps[0].num_tokens == 17
    assert steps[0].num_generated_tokens == 0
    assert steps[1].num_tokens <= 17
    assert sum(step.num_tokens for step in steps) == stats.num_batched_tokens
    assert sum(step.num_prompt_tokens for step in steps) == 17


def test_name_that_is_under_way():
    """A request that is rejected because another has its name is no end of that other one."""
    with batching() as batcher:
        trace = batcher.observe(ChromeTrace())
        first = batcher.submit(PROMPTS[0], **GREEDY, request_id="same")
        batcher.step()
        second = batcher._intake.make(PROMPTS[1], RequestOptions(request_id="other"), None, GREEDY, batcher)
        second.request_id = "same"  # two threads may come at once, and neither sees the other
        assert batcher._intake.enter(second)
        batcher.step()
        assert second.handle.result(timeout=0).finish_reason == "rejected"
        run(batcher, [first])
    events = trace.for_request("same")
    assert kinds(events).count(Queued) == kinds(events).count(Finished) == 1
    assert type(events[-1]) is Finished
    assert events[-1].finish_reason == "length"


def test_interrupt_at_the_door():
    """A policy that is interrupted is asked again; the request is queued once."""

    class Interrupted(Policy):
        calls = 0

        def key(self, request, outlook):
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return 0.0

    policy = Interrupted()
    with batching(policy=policy) as batcher:
        trace = batcher.observe(ChromeTrace())
        run(batcher, submit_all(batcher, PROMPTS[:1]))
    assert policy.calls == 2
    assert len(of_kind(trace, Queued)) == 1


def test_asyncio_and_idle():
    """`AsyncContinuousBatcher` takes observers as well; its thread says when it has nothing to do."""
    of = tiny("llama")
    trace = ChromeTrace()

    async def main():
        async with AsyncContinuousBatcher(of, poisoned_pool(of), observers=[trace]) as batcher:
            late = batcher.observe(ChromeTrace())
            outputs = await batcher.generate(PROMPTS, **GREEDY)
            await asyncio.to_thread(wait_for, lambda: of_kind(late, Idle), "the thread is idle")
            batcher.stop_observing(late)
            return outputs, late

    outputs, late = asyncio.run(main())
    assert tokens(outputs) == expected()
    assert len(of_kind(trace, Finished)) == len(of_kind(late, Finished)) == 5
    assert of_kind(late, Idle)[0].blocks_in_use == 0


def test_tokens_of_a_step_that_failed_count_once():
    """Of several forwards one fails: what the others stored of prompts is told, although nobody computes it again."""
    zoo = ZOOS["vera"]  # each adapter has a forward of its own
    of, events, calls = make(zoo), [], []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third forward")

    with ContinuousBatcher(of, poisoned_pool(of, block_size=4), observers=[events.append]) as batcher:
        handles = [batcher.submit(ids, adapter_name=name, **GREEDY) for ids, name in mixed([*zoo.exact])]
        hook = of.get_base_model().get_input_embeddings().register_forward_pre_hook(fail)
        outputs = run(batcher, handles)
        hook.remove()
        num_tokens = batcher.stats().num_batched_tokens
    assert len(calls) > 3
    assert [output.finish_reason for output in outputs] == ["length"] * len(outputs)
    steps = [event for event in events if isinstance(event, StepDone)]
    lengths = sum(len(output.prompt_ids) for output in outputs)
    assert sum(step.num_prompt_tokens + step.num_cached_tokens for step in steps) == lengths
    assert sum(step.num_tokens for step in steps) == num_tokens
