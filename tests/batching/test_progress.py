"""The progress bar of `generate`."""

import io
import types
from contextlib import redirect_stderr

import pytest

from paged_cache.batching import progress as progress_module
from paged_cache.batching.progress import Progress
from tests.batching.faults import GREEDY, PROMPTS, batching

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
