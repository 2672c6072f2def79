"""The loop: what comes in, what is cancelled, and who steps."""

import copy
import gc
import threading
import time
import weakref

import pytest

from paged_cache import BlockPool, ContinuousBatcher
from tests.batching.alone import tiny
from tests.batching.faults import (
    GREEDY,
    PATIENCE,
    PROMPTS,
    Streamer,
    batching,
    expected,
    hold_all,
    in_threads,
    reasons,
    run,
    submit_all,
    tokens,
    wait_for,
)

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("is_late", [False, True])
def test_interrupt_while_requests_are_taken_in(is_late, monkeypatch):
    """Ctrl-C before or behind the engine's `add` loses no request and takes none in twice."""
    with batching() as batcher:
        add, calls = batcher._engine.add, []

        def interrupted(*requests):
            calls.append(requests)
            if is_late:
                add(*requests)
            if len(calls) == 1:
                raise KeyboardInterrupt
            if not is_late:
                add(*requests)

        monkeypatch.setattr(batcher._engine, "add", interrupted)
        handles = submit_all(batcher)
        with pytest.raises(KeyboardInterrupt):
            batcher.step()
        assert tokens(run(batcher, handles)) == expected()
        assert batcher.stats().finished == {"length": 5}
        assert batcher.stats().num_waiting == 0


def test_a_request_in_between_counts_once(monkeypatch):
    """While requests go from the inbox to the engine the queue is as full as it is, not fuller."""
    with batching(max_queue_size=6, max_num_seqs=1) as batcher:
        add, begun, released = batcher._engine.add, threading.Event(), threading.Event()

        def slow(*requests):
            add(*requests)
            begun.set()
            released.wait(0.2)

        monkeypatch.setattr(batcher._engine, "add", slow)
        handles = submit_all(batcher, PROMPTS[:4])

        def submit():
            assert begun.wait(PATIENCE)
            handle = batcher.submit(PROMPTS[4], **GREEDY)
            released.set()
            return handle

        handles.append(in_threads(submit, batcher.step)[0])
        assert tokens(run(batcher, handles)) == expected()


def test_cancelled_from_inside_a_step():
    """A request that a listener cancels is over with the step that it was cancelled in."""
    with batching() as batcher:
        handles = submit_all(batcher, PROMPTS[:2])
        handles[0].add_listener(lambda token: handles[1].cancel())
        batcher.step()
        assert handles[1].done
        assert tokens(run(batcher, handles[:1])) == expected(PROMPTS[0])


def test_the_end_of_all_is_everybodys(monkeypatch):
    """Of requests that end together each has its output, whatever is raised at the end of one; the thread goes on."""
    with batching() as batcher:
        step, remove, failures = batcher._engine.step, batcher._engine.scheduler.remove, [ValueError("the step")]
        submitted = threading.Event()

        def failing_step():
            assert submitted.wait(PATIENCE)
            if failures:
                raise failures.pop()
            return step()

        def failing_remove(request):
            remove(request)
            if request is first:
                raise ValueError("the end")

        monkeypatch.setattr(batcher._engine, "step", failing_step)
        monkeypatch.setattr(batcher._engine.scheduler, "remove", failing_remove)
        handles = submit_all(batcher, streamer=None)
        handles.append(batcher.submit(PROMPTS[0], **GREEDY, streamer=Streamer("end", KeyboardInterrupt)))
        first = batcher._loop.pending[handles[0].request_id]
        batcher.start()
        submitted.set()
        outputs = [handle.result(timeout=PATIENCE) for handle in handles]
        assert reasons(outputs) == ["error"] * 6
        assert {str(output.error) for output in outputs} <= {"the step", "None"}
        assert batcher.submit(PROMPTS[0], **GREEDY).result(timeout=PATIENCE).finish_reason == "length"


def test_whoever_waits_steps_where_the_thread_died():
    """Nobody relies on a thread that is gone."""
    with batching() as batcher:
        batcher._loop._thread = threading.Thread(target=int)
        batcher._loop._thread.start()
        batcher._loop._thread.join()
        assert tokens([batcher.submit(PROMPTS[0], **GREEDY).result(timeout=PATIENCE)]) == expected(PROMPTS[0])


def test_a_started_batcher_that_nobody_holds():
    """Its requests come to their end, and then thread, pool and model go."""
    of = copy.deepcopy(tiny("llama"))
    pool = BlockPool.for_model(of, num_blocks=100, block_size=4)
    handle = ContinuousBatcher(of, pool).start().submit(PROMPTS[0], **GREEDY)
    gc.collect()
    assert [handle.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[0])
    remains = weakref.ref(pool), weakref.ref(of)
    del of, pool, handle

    def is_gone():
        gc.collect()
        threads = [thread for thread in threading.enumerate() if thread.name == "paged-cache-batcher"]
        return not threads and all(reference() is None for reference in remains)

    wait_for(is_gone, "something is left")


@pytest.mark.parametrize("is_started", [False, True])
def test_waiting_for_blocks_takes_no_time(is_started, monkeypatch):
    """While somebody else has all blocks the engine is asked now and then."""
    with batching(num_blocks=20) as batcher:
        sequence = hold_all(batcher.pool)
        step, calls = batcher._engine.step, []

        def counted():
            calls.append(0)
            return step()

        monkeypatch.setattr(batcher._engine, "step", counted)
        if is_started:
            batcher.start()
        handle = batcher.submit(PROMPTS[0], **GREEDY)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            handle.result(timeout=0.3)
        assert 1 < len(calls) < 200 * (time.monotonic() - start)
        batcher.pool.manager.release(sequence)
        assert [handle.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[0])
