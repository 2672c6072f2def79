"""Pictures of a pool: the data first, then how they are drawn."""

import io
import struct
import sys

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from paged_cache import BlockPool, PagedCache, patch
from paged_cache.picture import as_text, color, save_png, symbol
from paged_cache.pool_map import BlockState, Owner, PoolMap, pool_map

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BLOCKS = 24
PREFIX = list(range(3, 35))  # two blocks


@pytest.fixture(scope="module")
def model():
    """A tiny Llama, patched."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    patch(model)
    return model


@pytest.fixture
def pool(model):
    """A pool of 24 blocks of 16 tokens."""
    return BlockPool.for_model(model, num_blocks=BLOCKS)


def filled(model, pool, *rows):
    """A cache after one forward over rows of equal length."""
    cache = PagedCache(pool)
    with torch.no_grad():
        model(input_ids=torch.tensor(rows), past_key_values=cache)
    return cache


def drawn(picture, width=80, **options):
    """What a terminal shows."""
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(as_text(picture, width))
    return console.file.getvalue()


def size_of(path):
    """Width and height of a PNG."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_an_empty_pool_is_free(pool):
    """Nobody owns a block of a new pool."""
    picture = pool_map(pool)

    assert picture.owners == ()
    assert [block.kind for block in picture.blocks] == ["free"] * BLOCKS


def test_every_state_is_told_apart(model, pool):
    """Shared, owned (full and partly filled), cached and free blocks, in the right numbers and with their owners."""
    filled(model, pool, [*range(40, 60), *range(40, 52)]).release()
    caches = {"first": filled(model, pool, [*PREFIX, 1, 2]), "second": filled(model, pool, [*PREFIX, 2, 3])}
    picture = pool_map(pool, caches)

    assert [owner.letter for owner in picture.owners] == ["A", "B"]
    assert [len(owner.tables[0]) for owner in picture.owners] == [3, 3]
    assert (picture.count("referenced"), picture.num_shared) == (4, 2)
    assert (picture.count("cached"), picture.count("free")) == (2, BLOCKS - 6)
    for cache, name in zip(caches.values(), "ab", strict=True):
        shared, _, own = (picture.blocks[block] for block in cache.block_tables[0][0])
        assert (shared.num_refs, shared.owners, shared.num_tokens) == (2, (0, 1), 16)
        assert (own.num_refs, own.num_tokens, symbol(picture, own)) == (1, 2, name)


def test_counts_are_those_of_the_pool(model, pool):
    """The picture and `stats` agree."""
    cache = filled(model, pool, [*PREFIX, 1], [*PREFIX, 2])
    picture, stats = pool_map(pool, {"cache": cache}), pool.stats()

    assert picture.count("referenced") == stats.num_referenced
    assert picture.count("cached") == stats.num_cached
    assert picture.count("free") + picture.count("cached") == stats.num_free


def test_blocks_of_collected_caches_are_not_owned(model, pool):
    """What a cache held that is gone shows as cached or free, although nobody has asked the pool since."""
    filled(model, pool, PREFIX)

    assert pool_map(pool).count("referenced") == 0


def test_blocks_of_others_are_shown_as_theirs(model, pool):
    """A cache that the map was not asked for still holds its blocks."""
    other = filled(model, pool, [1, 2, 3])
    picture = pool_map(pool)
    block = picture.blocks[other.block_tables[0][0][0]]

    assert (block.kind, symbol(picture, block)) == ("referenced", "?")
    assert "others" in drawn(picture)


def test_looking_changes_nothing(model, pool):
    """Reading a pool leaves its blocks and counters as they are."""
    cache = filled(model, pool, PREFIX)
    before = pool.stats()
    pool_map(pool, {"cache": cache})
    pool.check()

    assert pool.stats() == before


def test_blocks_behind_a_window_belong_to_nobody():
    """A sliding window's returned blocks are free; the table keeps their place."""
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20)).eval()
    pool = BlockPool.for_model(model, num_blocks=BLOCKS, prefix_caching=False)
    with patch(model):
        cache = filled(model, pool, [*PREFIX, *PREFIX])
    picture = pool_map(pool, {"cache": cache})

    assert picture.owners[0].tables[0].count(-1) == 2
    assert picture.count("referenced") == 2


@pytest.mark.parametrize(("num_refs", "mark"), [(2, "2"), (9, "9"), (10, "+")])
def test_shared_blocks_say_by_how_many(pool, num_refs, mark):
    """One digit, or a plus for more."""
    assert symbol(pool_map(pool), BlockState("referenced", num_refs, (0,), 16)) == mark


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_text_fits_the_terminal(model, pool, width):
    """All blocks are drawn, in order, in as many lines as it takes, and can be read without colours."""
    cache = filled(model, pool, [*PREFIX, *range(40, 56)], [*PREFIX, *range(41, 57)])
    picture = pool_map(pool, {"cache": cache})
    cells = "".join(
        line.split("  ", 1)[1] for line in drawn(picture, width).split("\n\n")[0].splitlines() if line[:3].strip()
    )

    assert cells.replace(" ", "") == "".join(symbol(picture, block) for block in picture.blocks)
    assert {"2", "A", "B", "·"} == set(cells.replace(" ", ""))


def test_text_has_colours_where_there_are_any(model, pool):
    """Owners and shared blocks differ in colour."""
    cache = filled(model, pool, [*PREFIX, 1], [*PREFIX, 2])
    picture = pool_map(pool, {"cache": cache})
    text = drawn(picture, force_terminal=True, color_system="truecolor")

    assert len({color(block) for block in picture.blocks}) == 4  # two owners, shared, free
    assert "\x1b[" in text


def test_png_is_drawn(model, pool, tmp_path):
    """A picture of some size with many colours in a folder that was not there."""
    image = pytest.importorskip("matplotlib.image")
    cache = filled(model, pool, [*PREFIX, 1], [*PREFIX, 2])
    path = tmp_path / "new" / "pool.png"
    save_png(pool_map(pool, {"cache": cache}), path)
    width, height = size_of(path)
    pixels = torch.from_numpy(image.imread(path))[..., :3].flatten(0, 1)

    assert width > 1000
    assert height > 300
    assert len(pixels.unique(dim=0)) > 20
    assert 0.2 < (pixels == 1).all(1).float().mean() < 0.95  # neither empty nor full


@pytest.mark.parametrize("name", ["$x_{6$", "$5 and $6", "a_b^c"])
def test_names_are_no_formulas(name, model, pool, tmp_path, monkeypatch):
    """A `$` in a title or in a request's name is drawn as it is, however many there are."""
    figures = []
    module = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(
        module.Figure, "savefig", lambda self, *_, **__: (self.draw_without_rendering(), figures.append(self))
    )
    save_png(pool_map(pool, {name: filled(model, pool, [*PREFIX, 1])}), tmp_path / "pool.png", title=name)
    upper, lower = figures[0].axes
    texts = [
        *(text for text in upper.get_children() if name in getattr(text, "get_text", str)()),
        *lower.get_yticklabels(),
    ]

    assert [text.get_text()[: len(name)] for text in texts] == [name, name]
    assert not any(text.get_parse_math() for text in texts)


def of_size(num_blocks, num_rows):
    """A map of rows that hold all blocks, each as many."""
    each = num_blocks // num_rows
    tables = [list(range(row * each, (row + 1) * each)) for row in range(num_rows)]
    owners = tuple(Owner(f"r{row}", "A", [table], each * 16) for row, table in enumerate(tables))
    return PoolMap(owners, tuple(BlockState("referenced", 1, (i // each,), 16) for i in range(num_blocks)), 16)


def test_large_pools_are_drawn_soon(tmp_path, monkeypatch):
    """16,384 blocks take a few artists, without letters and with the first tables only, and the headings say so."""
    figures = []
    module = pytest.importorskip("matplotlib.figure")
    save = module.Figure.savefig
    monkeypatch.setattr(module.Figure, "savefig", lambda self, *a, **o: (figures.append(self), save(self, *a, **o)))
    save_png(of_size(16384, 128), tmp_path / "large.png")
    save_png(of_size(256, 4), tmp_path / "small.png")
    large, small = figures
    headings = [axes.get_title("left") for axes in large.axes]

    assert headings[0].endswith("(too many for letters)")
    assert headings[1].endswith("(the first 64 of 128, too many for numbers)")
    assert not any(axes.texts for axes in large.axes)
    assert sum(len(axes.collections) for axes in large.axes) < 10
    assert [len(axes.texts) for axes in small.axes] == [256, 256]
    assert "too many" not in "".join(axes.get_title("left") for axes in small.axes)
    assert max(size_of(tmp_path / "large.png")) < 5000


def test_png_of_an_empty_and_of_a_large_pool(model, tmp_path):
    """Nothing to show is no error, and neither are thousands of blocks."""
    pytest.importorskip("matplotlib")
    for num_blocks in (1, 3000):
        save_png(pool_map(BlockPool.for_model(model, num_blocks=num_blocks)), tmp_path / f"{num_blocks}.png")

        assert size_of(tmp_path / f"{num_blocks}.png")[1] > 200


def test_without_matplotlib_the_error_names_it(pool, tmp_path, monkeypatch):
    """So that the command can say what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        save_png(pool_map(pool), tmp_path / "pool.png")
