"""`save_pool_map`: what every block of a pool is used for, as a picture, a page or text."""

from collections.abc import Mapping
from pathlib import Path

from ..batching.asynchronous import AsyncContinuousBatcher
from ..batching.batcher import ContinuousBatcher
from ..cache import PagedCache
from ..errors import InvalidRequestError
from ..optional import require
from ..pool import BlockPool
from ..pool_map import PoolMap, pool_map
from ..wording import shown
from .pool_page import save_html

SUFFIXES = (".html", ".png", ".txt")


def save_pool_map(
    of: BlockPool | ContinuousBatcher | AsyncContinuousBatcher,
    path: str | Path,
    caches: Mapping[str, PagedCache] | None = None,
    title: str = "The pool",
) -> Path:
    """Writes what every block is used for now: free, cached, of which row, shared by how many.

    Args:
        of: A pool, or a batcher, whose rows are told apart by request id; it is looked at between two steps.
        path: What ends in `.html` is a page that needs nothing else, `.png` a picture (needs matplotlib and rich), `.txt` what a
            terminal shows (needs rich). The folder is made if it is not there.
        caches: By the name to show, caches of `generate` calls whose rows are told apart, too.
        title: Heading.

    Returns:
        The path.

    Raises:
        InvalidRequestError: The path ends in something else, or `of` has no blocks.
        PagedCacheError: A batcher, inside one of its steps.
        ModuleNotFoundError: What draws the picture is not installed; the message says what to install.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidRequestError(f"path={str(path)!r}: a name that ends in {', '.join(SUFFIXES)} is needed.")
    save(map_of(of, caches), path, title)
    return path


def map_of(
    of: BlockPool | ContinuousBatcher | AsyncContinuousBatcher, caches: Mapping[str, PagedCache] | None = None
) -> PoolMap:
    """The map that `save_pool_map` writes."""
    inner = of.batcher if isinstance(of, AsyncContinuousBatcher) else of
    if isinstance(inner, ContinuousBatcher):
        return inner.pool_map(caches)
    if not isinstance(inner, BlockPool):
        raise InvalidRequestError(f"{shown(inner)} has no blocks: a BlockPool or a batcher is needed.")
    return pool_map(inner, caches)


def save(picture: PoolMap, path: Path, title: str) -> None:
    """Writes a map in the form that the path's suffix names."""
    if path.suffix == ".html":
        save_html(picture, path, title)
        return
    require("rich")
    from ..picture import save_png, save_text

    if path.suffix == ".png":
        save_png(picture, path, title)
    else:
        save_text(picture, path)
