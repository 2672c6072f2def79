"""Links between pages lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, anchors, name, pages, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")
SCHEME = re.compile(r"^[a-z]+:")


def links(page: Path) -> list[str]:
    """Targets of a page's links, those of other sites left out."""
    return [target for target in LINK.findall(prose(page)) if not SCHEME.match(target)]


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link of a page is an existing file of the repository, each anchor a heading in it."""
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_there = file.exists() and ROOT in file.parents
        if not is_there or (anchor and anchor not in anchors(file)):
            broken.append(target)

    assert not broken


def test_pages_have_links() -> None:
    """The search finds the links that are there."""
    assert {"../examples/saved_prefix.py", "../benchmarks/README.md"} <= {
        target for page in pages() for target in links(page)
    }


def test_every_page_can_be_found() -> None:
    """README or the index of the documentation names each guide."""
    named = set()
    for start in (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "architecture.md"):
        named |= {(start.parent / target.partition("#")[0]).resolve() for target in links(start)}
    guides = {page for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"}

    assert guides
    assert not sorted(name(page) for page in guides - named)


@pytest.mark.parametrize("page", [page for page in pages() if "results/" in page.read_text(encoding="utf-8")], ids=name)
def test_results_that_are_cited_exist(page: Path) -> None:
    """A figure that names its file can be looked up."""
    cited = re.findall(r"`(?:benchmarks/)?(results/\w+\.json)`", page.read_text(encoding="utf-8"))
    missing = [file for file in cited if not (ROOT / "benchmarks" / file).is_file()]

    assert not missing
