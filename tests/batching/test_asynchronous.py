"""asyncio: requests end with the task that waits for them."""

import asyncio
import contextlib
import threading

import pytest

from paged_cache import AsyncContinuousBatcher
from paged_cache.batching.batcher import ContinuousBatcher
from tests.batching.alone import tiny
from tests.batching.faults import GREEDY, PATIENCE, PROMPTS, expected, is_free, tokens
from tests.models import poisoned_pool

pytestmark = pytest.mark.timeout(30)

LONG = {**GREEDY, "max_new_tokens": 250}
ENDLESS = {**GREEDY, "max_new_tokens": 900}  # not over before a busy machine gets to cancelling it


def asynchronously(**settings):
    """Runs a test's coroutine function with a batcher for asyncio; in the end all blocks are back."""

    def decorate(test):
        def call():
            pool = poisoned_pool(tiny("llama"), 600, 4)

            async def main():
                async with AsyncContinuousBatcher(tiny("llama"), pool, **settings) as batcher:
                    await test(batcher)

            asyncio.run(main())
            assert is_free(pool)

        call.__doc__, call.__name__ = test.__doc__, test.__name__
        return call

    return decorate


async def until(condition):
    """Waits for a condition that other threads bring about."""
    for _ in range(PATIENCE * 100):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not come")


async def leave(task):
    """Cancels a task and waits for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


def is_idle(batcher):
    """Whether nobody computes anything."""
    stats = batcher.stats()
    return stats.num_running == stats.num_waiting == 0


@asynchronously()
async def test_tokens_and_results(batcher):
    """Iterating, waiting and generating give what `generate` gives."""
    handle = await batcher.submit(PROMPTS[0], **GREEDY)
    assert [[token async for token in handle]] == expected(PROMPTS[0])
    assert (await handle.result()).finish_reason == "length"
    assert tokens(await batcher.generate(PROMPTS, **GREEDY)) == expected()


@asynchronously(max_queue_size=1, max_num_seqs=1)
async def test_generate_that_is_cancelled_while_the_queue_is_full(batcher):
    """What is in ends, and what is not yet in never comes."""
    task = asyncio.create_task(batcher.generate(PROMPTS * 6, **LONG))
    await until(lambda: batcher.stats().num_running and batcher.stats().num_waiting)
    await leave(task)
    await until(lambda: is_idle(batcher))
    assert set(batcher.stats().finished) == {"abort"}
    await asyncio.sleep(0.05)
    assert is_idle(batcher)
    assert sum(batcher.stats().finished.values()) < 6


@asynchronously()
async def test_generate_that_is_cancelled_while_it_waits(batcher):
    """All of its requests end, and nobody else's."""
    other = await batcher.submit(PROMPTS[0], **LONG)
    task = asyncio.create_task(batcher.generate(PROMPTS, **LONG))
    await until(lambda: batcher.stats().num_running == 6)
    await leave(task)
    await until(lambda: batcher.stats().finished.get("abort") == 5)
    assert (await other.result()).finish_reason == "length"


@pytest.mark.parametrize("name", ["submit", "_submit_all"])
def test_cancelled_while_the_thread_hands_in(name, monkeypatch):
    """Requests that a thread handed in for a task that is gone by then are ended, too."""
    original = getattr(ContinuousBatcher, name)
    begun, released = asyncio.Event(), threading.Event()

    @asynchronously()
    async def main(batcher):
        loop = asyncio.get_running_loop()

        def slow(*args, **options):
            loop.call_soon_threadsafe(begun.set)
            assert released.wait(PATIENCE)
            return original(*args, **options)

        monkeypatch.setattr(ContinuousBatcher, name, slow)
        act = batcher.submit(PROMPTS[0], **LONG) if name == "submit" else batcher.generate(PROMPTS[:1], **LONG)
        task = asyncio.create_task(act)
        await begun.wait()
        await leave(task)
        released.set()
        await until(lambda: batcher.stats().finished == {"abort": 1})

    main()


@asynchronously()
async def test_waiting_in_time(batcher):
    """`asyncio.wait_for` ends the request that it gives up; a timeout of `result` does not."""
    handles = [await batcher.submit(PROMPTS[i], **LONG) for i in range(2)]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(handles[0].result(), 0.02)
    with pytest.raises(TimeoutError, match=r"0\.02"):
        await handles[1].result(timeout=0.02)
    assert (await handles[0].result()).finish_reason == "abort"
    assert (await handles[1].result()).finish_reason == "length"


@asynchronously()
async def test_iterating_that_is_cancelled(batcher):
    """The request of a task that iterates ends with the task; one that is left by `break` ends when it is cancelled."""
    handle = await batcher.submit(PROMPTS[0], **ENDLESS)

    begun = asyncio.Event()

    async def iterate():
        async for _ in handle:
            begun.set()

    task = asyncio.create_task(iterate())
    await begun.wait()
    await leave(task)
    assert (await handle.result()).finish_reason == "abort"

    other = await batcher.submit(PROMPTS[1], **ENDLESS)
    async for _ in other:
        break
    assert not other.done
    other.cancel()
    assert (await other.result()).finish_reason == "abort"
