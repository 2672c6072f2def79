"""Maps of a pool as pages, pictures and text, of running batchers as well."""

import re
from html.parser import HTMLParser

import pytest
import torch

from paged_cache import AsyncContinuousBatcher, BlockPool, InvalidRequestError, PagedCache, PagedCacheError, patch
from paged_cache.observability import Generated, save_pool_map
from paged_cache.observability.maps import map_of
from tests.batching.alone import prompt, tiny
from tests.batching.faults import GREEDY, batching, run, submit_all

pytestmark = pytest.mark.timeout(30)


class Page(HTMLParser):
    """The cells of a page: (class, title, mark) within the pool and within the tables."""

    VOID = ("meta", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.others, self.links = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [value for name, value in attrs.items() if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "i" and "title" in self.open[-1][1]:
            attrs = self.open[-1][1]
            is_pool = any(other.get("id") == "pool" for _, other in self.open)
            (self.cells if is_pool else self.others).append((attrs["class"], attrs["title"], data))


@pytest.fixture
def busy():
    """A batcher in the middle: two requests that share a prefix, one of its own; a cached block of one that is over."""
    with batching(num_blocks=40, max_num_seqs=8) as batcher:
        run(batcher, submit_all(batcher, [prompt(9, 5)]))
        submit_all(batcher, [prompt(13, 1)], request_id="<one>")
        batcher.step()
        batcher.submit(prompt(13, 1), **GREEDY, request_id="twin")
        batcher.submit(prompt(6, 2), **GREEDY, request_id="own")
        batcher.step()
        yield batcher


def test_page_of_a_running_batcher(busy, tmp_path):
    """A cell per block with its state, references, owner by request id and tokens; tables below; nothing from outside."""
    path = save_pool_map(busy, tmp_path / "new" / "pool.html", title="A < B")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    stats = busy.pool.stats()
    assert not page.links
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "<h1>A &lt; B</h1>" in text
    assert len(page.cells) == 40
    assert [re.match(r"block (\d+):", title)[1] for _, title, _ in page.cells] == [str(i) for i in range(40)]
    kinds = [kind for kind, _, _ in page.cells]
    assert kinds.count("cached") == stats.num_cached > 0
    assert kinds.count("free") == stats.num_free - stats.num_cached > 0
    assert kinds.count("full") + kinds.count("partly") == stats.num_referenced
    shared = [title for _, title, mark in page.cells if mark == "2"]
    assert len(shared) == 3
    assert all("shared, 2 references, of <one> (A), twin (B), 4 of 4 tokens" in title for title in shared)
    assert [title for kind, title, mark in page.cells if kind == "partly" and "own (C)" in title and mark == "c"]
    found = map_of(busy)
    assert [owner.name for owner in found.owners] == ["<one>", "twin", "own"]
    in_tables = [mark for _, _, mark in page.others]
    assert in_tables == [str(block) for owner in found.owners for table in owner.tables for block in table]
    run(busy)
    assert map_of(busy).owners == ()


def test_picture_and_text(busy, tmp_path):
    """The suffix decides; text is what a terminal shows, without colours."""
    png = save_pool_map(busy, tmp_path / "pool.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    text = save_pool_map(busy, str(tmp_path / "pool.txt")).read_text(encoding="utf-8")
    assert "\x1b" not in text
    assert all(name in text for name in ("<one>", "twin", "own", "cached", "free"))
    assert "2 2 2" in text


def test_pool_of_generate(tmp_path):
    """A pool without a batcher: caches are told apart by the names that are given; others are shown as others'."""
    of = tiny("llama")
    pool = BlockPool.for_model(of, num_blocks=20, block_size=4)
    with patch(of):
        first, second = PagedCache(pool), PagedCache(pool)
        for cache, seed in ((first, 1), (second, 2)):
            of.generate(torch.tensor([prompt(6, seed)]), past_key_values=cache, **GREEDY)
        text = save_pool_map(pool, tmp_path / "pool.html", {"mine": first}).read_text(encoding="utf-8")
    titles = [title for _, title, _ in Page(text).cells]
    assert any("of mine (A)" in title for title in titles)
    assert any("of others" in title for title in titles)
    assert not any("second" in title for title in titles)


def test_between_steps():
    """An observer may look, since no step is under way; a streamer, inside of one, may not."""
    maps, refusals = [], []

    class Streamer:
        def put(self, value):
            with pytest.raises(PagedCacheError, match="inside a step") as error:
                map_of(batcher)
            refusals.append(error)

        def end(self):
            pass

    with batching() as batcher:
        batcher.observe(lambda event: type(event) is Generated and maps.append(map_of(batcher)))
        outputs = run(batcher, [batcher.submit(prompt(5), **GREEDY, streamer=Streamer(), request_id="one")])
    assert outputs[0].finish_reason == "length"
    assert len(maps) == 6
    assert [owner.name for owner in maps[0].owners] == ["one"]
    assert len(refusals) == 7


def test_what_cannot_be_drawn(tmp_path):
    """A suffix without a form, or something without blocks: refused by name, nothing is written."""
    pool = BlockPool.for_model(tiny("llama"), num_blocks=4)
    with pytest.raises(InvalidRequestError, match=r"pool\.gif.*\.html"):
        save_pool_map(pool, tmp_path / "pool.gif")
    with pytest.raises(InvalidRequestError, match="has no blocks"):
        save_pool_map("pool", tmp_path / "pool.html")
    assert not list(tmp_path.iterdir())


def test_asyncio(tmp_path):
    """`AsyncContinuousBatcher` is looked at between two steps of its thread."""
    import asyncio

    of = tiny("llama")

    async def main():
        async with AsyncContinuousBatcher(of, BlockPool.for_model(of, num_blocks=60)) as batcher:
            handle = await batcher.submit(prompt(9), max_new_tokens=400, do_sample=False, request_id="one")
            async for _ in handle:
                break
            path = await asyncio.to_thread(save_pool_map, batcher, tmp_path / "pool.html")
            handle.cancel()
            await handle.result(20)
            return path

    assert "one (A)" in asyncio.run(main()).read_text(encoding="utf-8")
