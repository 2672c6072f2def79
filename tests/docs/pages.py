"""The Markdown of the repository: pages, blocks of code, links, headings."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its page, the line that it begins on, the word behind the fence, the text."""

    page: Path
    line: int
    language: str
    text: str


def guides() -> list[Path]:
    """What readers copy from: README.md and the pages of docs/ that are written by hand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pages() -> list[Path]:
    """All Markdown that belongs to the repository."""
    return sorted(
        {
            *guides(),
            *ROOT.glob("*.md"),
            *(ROOT / "docs" / "api").glob("*.md"),
            *(ROOT / "benchmarks").glob("*.md"),
            *(ROOT / "paged_cache").rglob("*.md"),
        }
    )


def name(page: Path) -> str:
    """As people say it."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[2].strip(), match[3])


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What links to a page's headings say, as GitHub makes it: lower case, no punctuation, hyphens."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
