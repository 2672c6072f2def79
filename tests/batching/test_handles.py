"""Handles, waiting, cancelling and closing: from any thread, with and without the batcher's own."""

import asyncio
import gc
import re
import threading
import time

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

import paged_cache
from paged_cache import ContinuousBatcher, InvalidRequestError, OutOfBlocksError, PagedCacheError
from paged_cache.batching.policy import Policy
from tests.batching.alone import alone, prompt, tiny
from tests.batching.faults import (
    GREEDY,
    PATIENCE,
    PROMPTS,
    Streamer,
    batching,
    expected,
    failing,
    in_threads,
    is_free,
    reasons,
    run,
    submit_all,
    tokens,
    wait_for,
)
from tests.batching.test_failures import Unordered
from tests.models import poisoned_pool

pytestmark = pytest.mark.timeout(30)

LONG = {"max_new_tokens": 250}
BEAMS = {"num_beams": 3, "max_new_tokens": 20}


def no_threads_left():
    """Waits until no thread of a batcher is left."""
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("paged-cache")], "a thread is left")


# One request


def test_iterating_gives_tokens_as_they_come():
    """Whoever iterates does the work: each token is there before the next one is computed."""
    with batching() as batcher:
        handle = batcher.submit(PROMPTS[0], **GREEDY)
        seen = []
        for token in handle:
            seen.append(token)
            assert handle.tokens == seen
        assert handle.done
        assert [seen] == expected(PROMPTS[0]) == [handle.result().generated_tokens]
        assert list(handle) == seen


def test_iterating_over_a_failure():
    """Iteration ends with the error that ended the request, behind the tokens that came before it."""
    with batching() as batcher:
        handle = batcher.submit(PROMPTS[0], **GREEDY, streamer=Streamer(3))
        seen = []
        with pytest.raises(ValueError, match="the streamer"):
            seen.extend(handle)
        assert seen == expected(PROMPTS[0])[0][: len(seen)]
        assert len(seen) in (2, 3)


@pytest.mark.parametrize("is_started", [False, True])
def test_result_in_time(is_started):
    """A timeout of `result` raises and the request goes on; the next call gets it."""
    with batching() as batcher:
        handle = batcher.submit(PROMPTS[0], **LONG)
        with pytest.raises(TimeoutError, match="0"):
            handle.result(timeout=0)
        if is_started:
            batcher.start()
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"0\.02"):
            handle.result(timeout=0.02)
        assert 0.02 <= time.monotonic() - start < 5
        assert not handle.done
        assert [handle.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[0], **LONG)
        assert "length" in repr(handle)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("options", [{}, BEAMS, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_cancel(steps, options):
    """Cancelled at any moment a request ends with the tokens so far, its blocks come back, and others go on."""
    with batching(max_num_batched_tokens=16) as batcher:
        other = batcher.submit(PROMPTS[1], **GREEDY)
        handle = batcher.submit(PROMPTS[4], **{**GREEDY, **options})
        for _ in range(steps):
            batcher.step()
        so_far = handle.tokens
        handle.cancel()
        assert handle.done
        handle.cancel()
        output = handle.result(timeout=0)
        assert output.finish_reason == "abort"
        assert output.error is None
        if not options:
            assert output.generated_tokens == so_far == expected(PROMPTS[4])[0][: len(so_far)]
        assert [other.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[1])
        assert is_free(batcher.pool)
        no_threads_left()
        assert batcher.stats().finished == {"abort": 1, "length": 1}


def test_cancel_behind_the_end():
    """Cancelling what is over changes nothing, and no later request of the same id."""
    with batching() as batcher:
        first = batcher.submit(PROMPTS[0], **GREEDY, request_id="a")
        run(batcher)
        second = batcher.submit(PROMPTS[0], **GREEDY, request_id="a")
        first.cancel()
        assert first.result(timeout=0).finish_reason == "length"
        assert second.result(timeout=PATIENCE).finish_reason == "length"


def test_deadline_of_a_waiting_and_of_a_running_request():
    """Past its deadline a request ends with finish reason "timeout" and the tokens so far, whether it ran or not."""
    now = [100.0]
    with batching(max_num_seqs=1, clock=lambda: now[0]) as batcher:
        running = batcher.submit(PROMPTS[0], **LONG, timeout=5)
        batcher.step()
        waiting = batcher.submit(PROMPTS[1], **LONG, timeout=3)
        free = batcher.submit(PROMPTS[2], **GREEDY)
        batcher.step()
        now[0] = 103.0
        batcher.step()
        assert waiting.result(timeout=0).finish_reason == "timeout"
        assert waiting.result().generated_tokens == []
        assert not running.done
        now[0] = 105.0
        so_far = running.tokens
        batcher.step()
        output = running.result(timeout=0)
        assert output.finish_reason == "timeout"
        assert output.generated_tokens == so_far == expected(PROMPTS[0], **LONG)[0][: len(so_far)]
        assert len(so_far) == 3
        assert [free.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[2])
        assert is_free(batcher.pool)


def test_listeners():
    """A listener hears each further token and once the end, also if it comes late; one that fails disturbs nobody."""
    with batching() as batcher:
        heard, late, latest = [], [], []
        handle = batcher.submit(PROMPTS[0], **GREEDY)
        handle.add_listener(heard.append)
        handle.add_listener(lambda token: 1 / 0)
        batcher.step()
        handle.add_listener(late.append)
        right = handle.result(timeout=PATIENCE).generated_tokens
        handle.add_listener(latest.append)
        assert heard == [*right, None]
        assert late == [*right[1:], None]
        assert latest == [None]
        assert [right] == expected(PROMPTS[0])


# What may be called from inside a step


def from_inside(call):
    """A batcher whose streamer makes a call at its second token; the output, and what the call raised."""
    raised = []

    class Calling(Streamer):
        def put(self, value):
            super().put(value)
            if len(self.calls) == 3:
                try:
                    call(batcher, handle)
                except PagedCacheError as error:
                    raised.append(error)

    with batching() as batcher:
        handle = batcher.submit(PROMPTS[0], **GREEDY, streamer=Calling())
        output = handle.result(timeout=PATIENCE)
        run(batcher)
    return output, raised


CALLS = {
    "result": lambda batcher, handle: handle.result(),
    "result in time": lambda batcher, handle: handle.result(timeout=PATIENCE),
    "iterating": lambda batcher, handle: list(handle),
    "step": lambda batcher, handle: batcher.step(),
    "generate": lambda batcher, handle: batcher.generate([PROMPTS[1]], **GREEDY, progress_bar=False),
    "close": lambda batcher, handle: batcher.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_step_that_would_wait_for_itself(call):
    """A streamer that waits for its own batcher gets a clear error instead of a deadlock; the request goes on."""
    output, raised = from_inside(CALLS[call])

    assert [output.generated_tokens] == expected(PROMPTS[0])
    assert "inside a step" in str(raised[0])


def test_a_beam_search_that_would_wait_for_itself():
    """A processor of a beam search runs in a thread of its own, but inside a step all the same."""

    class Waiting(LogitsProcessor):
        def __call__(self, input_ids, scores):
            other.result(timeout=PATIENCE)
            return scores

    with batching() as batcher:
        other = batcher.submit(PROMPTS[1], **GREEDY)
        beams = batcher.submit(PROMPTS[0], **BEAMS, logits_processor=LogitsProcessorList([Waiting()]))
        outputs = run(batcher, [other, beams])
    assert "inside a step" in str(outputs[1].error)
    assert tokens(outputs[:1]) == expected(PROMPTS[1])


def test_submit_and_cancel_from_inside_a_step():
    """A streamer may submit a request, and end one, its own included."""
    handles = []

    def call(batcher, handle):
        handles.append(batcher.submit(PROMPTS[1], **GREEDY))
        handle.cancel()

    output, raised = from_inside(call)

    assert not raised
    assert output.finish_reason == "abort"
    assert [output.generated_tokens] == [expected(PROMPTS[0])[0][:2]]
    assert tokens([handles[0].result(timeout=0)]) == expected(PROMPTS[1])


# Threads


@pytest.mark.parametrize("is_started", [False, True])
def test_many_threads(is_started):
    """Threads submit, iterate, wait and cancel at once: each request has its own tokens and one end."""
    want = expected()

    with batching(max_num_seqs=4, max_num_batched_tokens=32) as batcher:
        if is_started:
            batcher.start()

        def ask(i):
            for k in range(4):
                n = (i + k) % len(PROMPTS)
                handle = batcher.submit(PROMPTS[n], **GREEDY)
                if k == 0:
                    assert list(handle) == want[n]
                elif k == 1:
                    handle.cancel()
                    assert handle.done
                elif k == 2:
                    (output,) = batcher.generate([PROMPTS[n]], **GREEDY, progress_bar=False)
                    assert output.generated_tokens == want[n]
                output = handle.result(timeout=PATIENCE)
                assert output.finish_reason == "length" if k != 1 else output.finish_reason in ("abort", "length")
                assert output.generated_tokens == want[n][: len(output.generated_tokens)]

        in_threads(*(lambda i=i: ask(i) for i in range(6)))
        assert sum(batcher.stats().finished.values()) == 30
        assert is_free(batcher.pool)
    no_threads_left()


def test_nobody_waits_for_a_step_that_nobody_makes():
    """Whoever stops stepping leaves the work to those who still wait, at once."""
    with batching(max_num_seqs=8) as batcher:

        def ask(i):
            for k in range(20):
                assert batcher.submit(prompt(3, i), max_new_tokens=1 + (i + k) % 3).result(timeout=PATIENCE)

        start = time.monotonic()
        in_threads(*(lambda i=i: ask(i) for i in range(4)))
        assert time.monotonic() - start < 5  # each missed turn would take a second


@pytest.mark.parametrize("is_started", [False, True])
def test_generate_from_two_threads(is_started):
    """Two threads generate on one batcher, with a queue that is too small for either: all are served."""
    want = expected()
    with batching(max_num_seqs=2, max_queue_size=1) as batcher:
        if is_started:
            batcher.start()
        calls = [lambda: batcher.generate(PROMPTS, **GREEDY, progress_bar=False)] * 3
        for outputs in in_threads(*calls):
            assert tokens(outputs) == want


def test_cancel_and_close_while_another_thread_generates():
    """Whoever steps lets others in between two steps."""
    with batching(num_blocks=600) as batcher:
        handles = []

        def generate():
            return batcher.generate([PROMPTS[0]], max_new_tokens=2000, progress_bar=False)

        def interfere():
            wait_for(lambda: batcher.stats().num_steps > 2, "it does not begin")
            for _ in range(10):
                handles.append(batcher.submit(PROMPTS[1], **LONG))
                handles[-1].cancel()
                assert handles[-1].done
            before = batcher.stats().num_steps
            batcher.close()
            return before

        (output,), before = in_threads(generate, interfere)
        assert output.finish_reason == "abort"
        assert before < 1500
        assert reasons(handle.result(timeout=0) for handle in handles) == ["abort"] * 10


def test_thread_of_the_batcher():
    """After `start` handles fill by themselves; a thread started twice is one, and is gone after `close`."""
    with batching() as batcher:
        assert batcher.start() is batcher.start()
        assert sum(t.name == "paged-cache-batcher" for t in threading.enumerate()) == 1
        handles = submit_all(batcher)
        wait_for(lambda: all(handle.done for handle in handles), "nobody steps")
        assert tokens(handle.result(timeout=0) for handle in handles) == expected()
        handles = submit_all(batcher)  # it slept meanwhile
        assert tokens(handle.result(timeout=PATIENCE) for handle in handles) == expected()
    no_threads_left()


def test_thread_of_the_batcher_survives_interrupts():
    """What leaves a step in the batcher's own thread takes the step back; the thread goes on."""
    with batching() as batcher:
        batcher.start()
        handle = batcher.submit(PROMPTS[0], **GREEDY, streamer=Streamer(2, KeyboardInterrupt))
        others = submit_all(batcher)
        assert [handle.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[0])
        assert tokens(other.result(timeout=PATIENCE) for other in others) == expected()


def test_thread_of_the_batcher_gives_up_at_last():
    """A processor that interrupts every step ends what runs, instead of keeping everybody waiting forever."""

    def interrupt(input_ids, scores):
        raise KeyboardInterrupt

    with batching(max_num_seqs=2) as batcher:
        batcher.start()
        bad = batcher.submit(PROMPTS[0], **GREEDY, logits_processor=[interrupt])
        assert "every step was interrupted by KeyboardInterrupt" in str(bad.result(timeout=PATIENCE).error)
        assert tokens(handle.result(timeout=PATIENCE) for handle in submit_all(batcher)) == expected()


def test_observer_that_leaves():
    """It is called no more; the thread goes on, and no request suffers."""
    heard = []

    def leave(event):
        heard.append(event)
        raise SystemExit

    with batching(observers=[leave]) as batcher:
        batcher.start()
        for _ in range(2):
            assert tokens(handle.result(timeout=PATIENCE) for handle in submit_all(batcher)) == expected()
    assert len(heard) == 1


def test_policy_that_leaves():
    """The request that it leaves at ends with an error; the thread goes on."""

    class Leaving(Policy):
        name = "leaving"

        def key(self, request, outlook):
            if request.request_id == "bad":
                raise SystemExit
            return request.arrival_time

    with batching(policy=Leaving()) as batcher:
        batcher.start()
        bad = batcher.submit(PROMPTS[0], **GREEDY, request_id="bad").result(timeout=PATIENCE)
        assert (bad.finish_reason, "SystemExit" in str(bad.error)) == ("error", True)
        assert tokens(handle.result(timeout=PATIENCE) for handle in submit_all(batcher)) == expected()


@pytest.mark.parametrize("is_started", [False, True])
@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("options", ["logits_processor", "stopping_criteria", "streamer"])
def test_code_of_a_request_that_leaves(options, error, is_started):
    """`sys.exit` in code of a request ends this request, with what was raised, and no other."""

    def leave(*_):
        raise error("3")

    own = {options: Streamer(2, error) if options == "streamer" else [leave]}
    with batching() as batcher:
        if is_started:
            batcher.start()
        handles = [batcher.submit(PROMPTS[0], **GREEDY, **own), *submit_all(batcher)]
        bad, *others = (handle.result(timeout=PATIENCE) for handle in handles)
        assert bad.finish_reason == "error"
        assert f"code of the request raised {error.__name__}" in str(bad.error)
        assert tokens(others) == expected()


@pytest.mark.parametrize("is_started", [False, True])
def test_policy_that_cannot_rank(is_started, caplog):
    """No request ends because a policy fails at ranking: they are served by their keys, and people are told once."""
    with caplog.at_level("WARNING", "paged_cache"), batching(policy=Unordered("rank"), max_num_seqs=1) as batcher:
        if is_started:
            batcher.start()
        outputs = [handle.result(timeout=PATIENCE) for handle in submit_all(batcher)]
        assert tokens(outputs) == expected()
    assert [record.message for record in caplog.records if "cannot rank" in record.message] == [
        "policy 'unordered' cannot rank, keys are taken: ValueError: rank"
    ]


def test_text_streamer_in_another_thread():
    """transformers' iterator over text works beside the batcher's thread."""

    class Tokenizer:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(token)} " for token in ids)

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True, timeout=PATIENCE)
    with batching() as batcher:
        batcher.start()
        batcher.submit(PROMPTS[0], **GREEDY, streamer=streamer)
        assert [int(token) for token in "".join(streamer).split()] == expected(PROMPTS[0])[0]


def test_text_streamer_after_a_failure():
    """Whoever reads a streamer hears of the end also if the forward failed."""
    streamer = Streamer()
    with batching() as batcher, failing(tiny("llama"), lambda number, _: number == 3, ValueError("the model")):
        (output,) = run(batcher, [batcher.submit(PROMPTS[0], **GREEDY, streamer=streamer)])
    assert output.finish_reason == "error"
    assert streamer.calls[-1] == "end"


def test_text_streamer_of_a_rejected_request():
    """Whoever reads a streamer hears of the end also if the request never began, whatever the streamer raises."""
    with batching(num_blocks=8, max_queue_size=1) as batcher:
        full = batcher.submit(PROMPTS[0], **GREEDY)
        for ids, streamer in ((prompt(50), Streamer()), (PROMPTS[0], Streamer()), (PROMPTS[0], Streamer("end"))):
            output = batcher.submit(ids, **GREEDY, streamer=streamer).result(timeout=0)
            assert output.finish_reason == "rejected"
            assert str(output.error) != "the streamer"
            assert streamer.calls == ["end"]
        assert tokens(run(batcher, [full])) == expected(PROMPTS[0])


# The queue


def test_full_queue_rejects_what_is_submitted():
    """Beyond `max_queue_size` a request is over at once, with the numbers; there is room again when others began."""
    with batching(max_num_seqs=1, max_queue_size=2) as batcher:
        handles = submit_all(batcher, PROMPTS[:3])
        output = handles[2].result(timeout=0)
        assert output.finish_reason == "rejected"
        assert "max_queue_size is 2" in str(output.error)
        assert output.prompt_ids == PROMPTS[2]
        batcher.step()
        last = batcher.submit(PROMPTS[2], **GREEDY)
        assert not last.done
        assert tokens(run(batcher, [*handles[:2], last])) == expected(*PROMPTS[:3])
        assert batcher.stats().finished == {"rejected": 1, "length": 3}


def test_generate_feeds_itself():
    """`generate` hands in as many as the queue takes and waits, however long the list is."""
    with batching(max_num_seqs=2, max_queue_size=1) as batcher:
        assert tokens(batcher.generate(PROMPTS * 2, **GREEDY, progress_bar=False)) == expected() * 2


def test_rejected_at_submit_with_the_numbers():
    """What can never fit is rejected before anything is computed: too many blocks, too many rows."""
    with batching(num_blocks=8, max_num_seqs=2) as batcher:
        long = batcher.submit(prompt(20), max_new_tokens=14).result(timeout=0)
        assert long.finish_reason == "rejected"
        assert isinstance(long.error, OutOfBlocksError)
        assert (long.error.needed, long.error.free) == (9, 8)
        assert {"20", "14", "9", "8"} <= set(re.findall(r"\d+", str(long.error)))
        wide = batcher.submit(PROMPTS[0], **GREEDY, num_beams=3).result(timeout=0)
        assert wide.finish_reason == "rejected"
        assert "max_num_seqs=2" in str(wide.error)
        assert batcher.submit(prompt(20), max_new_tokens=13).result(timeout=PATIENCE).finish_reason == "length"
        assert batcher.stats().num_steps == 13


def test_request_ids():
    """An id is taken as long as its request is under way, whether it waits, runs, or is in the same list."""
    with batching() as batcher:
        handle = batcher.submit(PROMPTS[0], **GREEDY, request_id="a")
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="'a' is under way"):
                batcher.submit(PROMPTS[1], **GREEDY, request_id="a")
            batcher.step()
        with pytest.raises(InvalidRequestError, match="'b' is given 2 times"):
            batcher.generate(PROMPTS[:3], **GREEDY, request_id=["b", "c", "b"])
        assert handle.result(timeout=PATIENCE).request_id == "a"
        assert batcher.submit(PROMPTS[1], **GREEDY, request_id="a").result(timeout=PATIENCE).error is None
        made = [batcher.submit(PROMPTS[0], **GREEDY).request_id for _ in range(3)]
        assert len(set(made)) == 3
        assert batcher.stats().finished["length"] == 2


def test_two_threads_take_one_id():
    """Of two requests with one id at the same time one is refused or rejected, and none is lost."""
    with batching() as batcher:

        def ask():
            try:
                return batcher.submit(PROMPTS[0], **GREEDY, request_id="a").result(timeout=PATIENCE).finish_reason
            except InvalidRequestError:
                return "refused"

        for _ in range(10):
            assert set(in_threads(*[ask] * 4)) <= {"length", "refused", "rejected"}


# The end


@pytest.mark.parametrize("is_started", [False, True])
def test_close_with_requests_under_way(is_started):
    """Everything ends with finish reason "abort": results return, iterators end, blocks are back, the model is itself again."""
    of, pool = tiny("llama"), poisoned_pool(tiny("llama"))
    before = of.config._attn_implementation
    batcher = ContinuousBatcher(of, pool, max_num_seqs=4)
    assert paged_cache.is_patched(of)
    if is_started:
        batcher.start()
    handles = [batcher.submit(ids, **options) for ids in PROMPTS for options in ({"max_new_tokens": 200}, BEAMS)]
    iterator = iter(handles[0])
    first = next(iterator)
    batcher.close()
    outputs = [handle.result(timeout=0) for handle in handles]
    assert set(reasons(outputs)) <= {"abort", "length"}
    assert reasons(outputs).count("abort") >= 2
    assert [first, *iterator] == outputs[0].generated_tokens
    assert (
        outputs[0].generated_tokens == expected(PROMPTS[0], max_new_tokens=200)[0][: len(outputs[0].generated_tokens)]
    )
    batcher.close()
    assert is_free(pool)
    no_threads_left()
    assert not paged_cache.is_patched(of)
    assert of.config._attn_implementation == before
    for call in (
        lambda: batcher.submit(PROMPTS[0]),
        lambda: batcher.generate([PROMPTS[0]]),
        batcher.start,
    ):
        with pytest.raises(PagedCacheError, match="closed"):
            call()


def test_model_that_was_patched_before_stays_patched():
    """A batcher takes back its own patch only."""
    of = tiny("llama")
    with paged_cache.patch(of):
        with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
            assert batcher.submit(PROMPTS[0], **GREEDY).result(timeout=PATIENCE).error is None
        assert paged_cache.is_patched(of)
    assert not paged_cache.is_patched(of)


def test_batcher_that_cannot_be_made():
    """A wrong option leaves the model as it was."""
    of = tiny("llama")
    for options, words in (({"policy": "best"}, "best"), ({"max_num_seqs": 0}, "0"), ({"max_queue_size": 0}, "0")):
        with pytest.raises(InvalidRequestError, match=words):
            ContinuousBatcher(of, poisoned_pool(of), **options)
        assert not paged_cache.is_patched(of)


def test_batcher_that_nobody_holds():
    """Without `close`, a batcher that is garbage leaves the model unpatched and the pool whole."""
    of, pool = tiny("llama"), poisoned_pool(tiny("llama"))
    batcher = ContinuousBatcher(of, pool)
    handle = batcher.submit(PROMPTS[0], **GREEDY)
    batcher.step()
    assert not is_free(pool)
    del batcher, handle
    gc.collect()
    assert not paged_cache.is_patched(of)
    assert is_free(pool)


def test_handle_keeps_its_batcher():
    """Whoever has a handle gets a result, even if nobody else holds the batcher."""
    of, pool = tiny("llama"), poisoned_pool(tiny("llama"))

    def submit():
        return ContinuousBatcher(of, pool).submit(PROMPTS[0], **GREEDY)

    handle = submit()
    gc.collect()
    assert [handle.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[0])
    del handle
    gc.collect()
    assert not paged_cache.is_patched(of)
    assert is_free(pool)


def test_submit_while_another_thread_closes():
    """A request that comes during `close` is refused or ended: nobody waits for it forever."""
    for _ in range(5):
        with batching() as batcher:
            batcher.start()

            def ask(batcher=batcher):
                try:
                    while True:
                        assert batcher.submit(PROMPTS[0], **GREEDY).result(timeout=PATIENCE).finish_reason in (
                            "length",
                            "abort",
                        )
                except PagedCacheError:
                    return

            in_threads(ask, ask, lambda batcher=batcher: (time.sleep(0.02), batcher.close()))


def test_interrupt_during_generate():
    """Ctrl-C during `generate` ends its requests and no others, gives their blocks back, and the batcher goes on."""
    with batching() as batcher:
        other = batcher.submit(PROMPTS[0], **GREEDY)
        with pytest.raises(KeyboardInterrupt):
            batcher.generate([PROMPTS[1], PROMPTS[2]], **GREEDY, streamer=[None, Streamer(2, KeyboardInterrupt)])
        assert batcher.stats().finished == {"abort": 2}
        assert [other.result(timeout=PATIENCE).generated_tokens] == expected(PROMPTS[0])
        assert is_free(batcher.pool)
        assert tokens(batcher.generate(PROMPTS, **GREEDY)) == expected()


# Beam search


def test_threads_of_beam_searches():
    """Beam searches leave no thread behind: at their end, cancelled, failed."""
    with batching(max_num_seqs=12) as batcher:
        handles = submit_all(batcher, PROMPTS[:4], **BEAMS)
        for _ in range(3):
            batcher.step()
        assert sum(t.name == "paged-cache-beam-search" for t in threading.enumerate()) == 4
        handles[0].cancel()
        handles[1].cancel()
        outputs = run(batcher, handles)
        assert [output.sequences[0] for output in outputs[2:]] == expected(*PROMPTS[2:4], **BEAMS)
        no_threads_left()


def test_random_numbers_of_beam_sampling():
    """With a seed of its own a beam search leaves torch's random numbers as they are, and gives what `generate` gives."""
    options = {**BEAMS, "do_sample": True}
    want = alone(tiny("llama"), PROMPTS[0], **options, seed=4)
    with batching() as batcher:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        handles = [batcher.submit(PROMPTS[0], **options, seed=4), *submit_all(batcher, **options, seed=5)]
        for steps in range(400):
            if not batcher.step():
                break
            if steps == 5:
                handles[1].cancel()
            assert torch.equal(torch.get_rng_state(), state)
        assert handles[0].result(timeout=0).sequences == want
        assert torch.equal(torch.get_rng_state(), state)


def test_a_request_that_is_given_up_without_waiting_ends_in_the_next_step():
    """`cancel(wait=False)` takes no lock, even of somebody who is in the middle of a step; the next step gives the blocks back."""
    of = tiny("llama")
    pool = poisoned_pool(of, 100, 4)
    with ContinuousBatcher(of, pool) as batcher:
        handle = batcher.submit(prompt(9), max_new_tokens=50)
        batcher.step()
        with batcher._loop._stepping:
            handle.cancel(wait=False)
        assert not handle.done
        assert pool.num_free < pool.num_blocks - pool.num_cached
        batcher.step()
        assert handle.result(timeout=0).finish_reason == "abort"
        assert pool.num_free == pool.num_blocks
