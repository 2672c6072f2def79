"""The page by error message has the messages of the code, and all that users meet."""

import re

import pytest

from tests.docs.messages import HOLE, SHORTEST, is_quoted, messages, strings
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
OF_OTHERS = {"Cannot copy out of meta tensor"}  # quoted, but not ours

# Messages without a line on the page, by file, and why.
NOT_ON_THE_PAGE = {
    "paged_cache/kernels/checks.py": "arguments of a kernel that is called by hand: docs/kernels.md says what they are",
    "paged_cache/kernels/triton/": "the same",
    "paged_cache/kernels/cpu/cache.py": "the same",
    "paged_cache/memory/": "broken bookkeeping: bugs of ours, which the page says in one line for all",
    "paged_cache/bench/": "options of a benchmark, named by the message",
    "paged_cache/cli/": "options of a command, named by the message; others are on the page",
    "paged_cache/compare/": "the same",
    "paged_cache/planning/": "the same",
}


def quotes() -> list[str]:
    """Code in the first column of the page's tables."""
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [row[1] for row in rows if len(row) == 5]  # three columns
    return [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)] + inline()


def inline() -> list[str]:
    """Messages in the sentences of the page: behind a level, or with the words that mark them."""
    text = re.sub(r"^\|.*$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.findall(r"(?:INFO|WARNING|ERROR) `([^`]+)`", text) + re.findall(r"tables \(`([^`]+)`\)", text)


def says_something(quote: str) -> bool:
    """Whether a quote has enough words to be found by."""
    return any(len(re.sub(r"\W", "", part)) >= SHORTEST // 2 for part in quote.split(HOLE))


def test_quoted_messages_are_those_of_the_code() -> None:
    """Whoever searches the page for the message at hand finds it, word for word."""
    texts = strings() | {message.text for message in messages()}
    gone = [quote for quote in quotes() if quote not in OF_OTHERS and not any(is_quoted(quote, t) for t in texts)]

    assert len(quotes()) > 100
    assert not gone


def test_every_message_is_on_the_page() -> None:
    """All that is raised or logged has a line, or a reason not to have one."""
    known = [quote for quote in quotes() if says_something(quote)]
    missing = [
        f"{message.file}:{message.line} {message.kind}: {message.text}"
        for message in messages()
        if not any(is_quoted(quote, message.text) for quote in known)
        and not any(message.file.startswith(name) for name in NOT_ON_THE_PAGE)
    ]

    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", NOT_ON_THE_PAGE)
def test_exceptions_are_still_needed(name: str) -> None:
    """A file that gives no messages needs no reason."""
    assert any(message.file.startswith(name) for message in messages())


@pytest.mark.parametrize("wrong", ["num_blocks ist …; a pool", "a pool needs at least 1 block … num_blocks"])
def test_a_message_that_is_not_there_is_noticed(wrong: str) -> None:
    """The comparison can fail: other words, or another order."""
    text = next(m.text for m in messages() if "a pool needs at least 1 block" in m.text)

    assert is_quoted("num_blocks is …; a pool needs at least 1 block", text)
    assert not is_quoted(wrong, text)
