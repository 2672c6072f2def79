"""The progress bar of `generate`."""

import asyncio
import io
import types
from contextlib import redirect_stderr

import pytest

from paged_cache import AsyncContinuousBatcher
from paged_cache.batching import progress as progress_module
from paged_cache.batching.progress import Progress
from tests.batching.alone import tiny
from tests.batching.faults import GREEDY, PROMPTS, batching, expected, tokens
from tests.batching.test_asynchronous import leave, until
from tests.models import poisoned_pool

pytestmark = pytest.mark.timeout(30)


class Terminal(io.StringIO):
    """Where tqdm would draw."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in place of standard error, to `redirect_stderr` to; each refresh is written."""
    terminal = Terminal()
    monkeypatch.setattr(progress_module, "REFRESH_SECONDS", 0.0)
    return terminal


def test_bar(terminal):
    """On a terminal: how many are over, what runs and waits, tokens per second, how full the pool is; full in the end."""
    with batching(max_num_seqs=2) as batcher, redirect_stderr(terminal):
        batcher.generate(PROMPTS, **GREEDY)
    text = terminal.getvalue()
    assert "5/5" in text
    for words in ("running", "waiting", "tokens/s", "KV"):
        assert words in text


@pytest.mark.parametrize("prompts", [PROMPTS[:2], []], ids=["off", "nothing to do"])
def test_no_bar(terminal, prompts):
    """None where it is not wanted, or where there is nothing to show."""
    with batching() as batcher, redirect_stderr(terminal):
        outputs = batcher.generate(prompts, **GREEDY, progress_bar=not prompts)
    assert len(outputs) == len(prompts)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("is_shown", [True, False])
def test_bar_for_asyncio(terminal, is_shown):
    """Awaited, the bar is the same, for who asks for it; the tokens are the same either way."""

    async def main():
        async with AsyncContinuousBatcher(tiny("llama"), poisoned_pool(tiny("llama"), 600, 4)) as batcher:
            assert await batcher.generate([], progress_bar=is_shown) == []
            outputs = await batcher.generate(PROMPTS, progress_bar=is_shown, **GREEDY)
            assert tokens(outputs) == expected()

    with redirect_stderr(terminal):
        asyncio.run(main())
    assert ("5/5" in terminal.getvalue()) == ("tokens/s" in terminal.getvalue()) == is_shown
    assert is_shown or terminal.getvalue() == ""


def test_bar_for_asyncio_is_closed_by_cancelling(terminal):
    """A task that is cancelled while its bar is shown ends its requests and the bar's line."""

    async def main():
        pool = poisoned_pool(tiny("llama"), 600, 4)
        async with AsyncContinuousBatcher(tiny("llama"), pool) as batcher:
            options = GREEDY | {"max_new_tokens": 400}
            task = asyncio.create_task(batcher.generate(PROMPTS, progress_bar=True, **options))
            await until(lambda: "0/5" in terminal.getvalue())
            await leave(task)
            await until(lambda: batcher.stats().finished.get("abort") == len(PROMPTS))

    with redirect_stderr(terminal):
        asyncio.run(main())
    assert "5/5" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_no_bar_elsewhere():
    """Nothing is written to what is no terminal, a log file say."""
    log = io.StringIO()
    with batching() as batcher, redirect_stderr(log):
        batcher.generate(PROMPTS[:1], **GREEDY)
    assert log.getvalue() == ""


def test_count():
    """All are over exactly when the count says so, in whatever order they end."""
    handles = [types.SimpleNamespace(done=False) for _ in range(4)]
    with Progress(4, False, lambda: None) as progress:
        for i, number in ((2, 0), (0, 1), (1, 3), (3, 4)):
            handles[i].done = True
            assert progress.count(handles) == number


def test_bar_is_closed_by_an_error(terminal):
    """An error on the way leaves the cursor on a new line and no number that is not true."""
    with batching() as batcher:

        def interrupt(*args):
            raise KeyboardInterrupt

        streamer = types.SimpleNamespace(put=interrupt, end=lambda: None)
        with pytest.raises(KeyboardInterrupt), redirect_stderr(terminal):
            batcher.generate(PROMPTS[:2], **GREEDY, streamer=[streamer, None])
    assert "2/2" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")
