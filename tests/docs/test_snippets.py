"""Every block of Python in README.md and docs/ runs, page by page."""

import ast
import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import paged_cache
from tests.docs.pages import Block, blocks, guides, name
from tests.docs.preludes import INSTEAD, PRELUDES, shared_model, usual

# Blocks that cannot run here say so, in a comment that readers see too: "# not run by the tests: needs a GPU".
NOT_RUN = re.compile(r"# not run by the tests: \S+")


def python(page: Path) -> list[Block]:
    """The blocks of Python on a page."""
    return [block for block in blocks(page) if block.language == "python"]


def code(block: Block) -> Any:
    """A block, compiled, in sizes that suit this machine; `await` may stand outside of functions."""
    text = "\n" * block.line + block.text
    for pattern, replacement in INSTEAD:
        text = re.sub(pattern, lambda _, new=replacement: new, text)
    return compile(text, name(block.page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def execute(block: Block, names: dict[str, Any]) -> None:
    """Run a block."""
    compiled = code(block)
    if compiled.co_flags & inspect.CO_COROUTINE:
        asyncio.run(asyncio.wait_for(eval(compiled, names), timeout=60))
    else:
        exec(compiled, names)


def is_import(value: Any) -> bool:
    """Whether a reader has to import it, as a module, a class or a function."""
    return isinstance(value, ModuleType | type) or inspect.isroutine(value)


def close(names: dict[str, Any]) -> None:
    """End what the blocks of a page left open."""
    for value in [names.get("batcher"), names.get("paged")]:
        if inspect.ismethod(getattr(value, "close", None)) and not inspect.iscoroutinefunction(value.close):
            value.close()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files that blocks write lie in a folder of the test; the shared model is left as it was."""
    monkeypatch.chdir(tmp_path)
    yield
    while paged_cache.is_patched(shared_model()):
        paged_cache.unpatch(shared_model())


@pytest.mark.filterwarnings("ignore:.*which is a no-op:UserWarning")  # docs/accelerate.md says so
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", [page for page in guides() if python(page)], ids=name)
def test_python_runs(page: Path) -> None:
    """What a page shows works as it stands, one block after the other, on the model that the package ships."""
    names: dict[str, Any] = {}
    prepare = PRELUDES.get(name(page), usual)
    try:
        for number, block in enumerate(python(page)):
            given = prepare(number)
            assert not [word for word, value in given.items() if is_import(value)], "pages import what they use"
            names.update(given)
            if NOT_RUN.search(block.text):
                code(block)
            else:
                execute(block, names)
    finally:
        close(names)


def test_imports_are_noticed() -> None:
    """The check of preludes can fail, and lets values pass."""
    given = usual(0)

    assert all(map(is_import, (paged_cache, paged_cache.BlockPool, paged_cache.patch)))
    assert not any(map(is_import, given.values()))
    assert {"model", "pool", "prompts", "tokenizer"} <= given.keys()


def test_preludes_belong_to_pages() -> None:
    """A page that was renamed takes its prelude along."""
    assert PRELUDES.keys() <= {name(page) for page in guides() if python(page)}


@pytest.mark.usefixtures("elsewhere")
def test_the_policy_in_the_docs_orders_requests() -> None:
    """The class in scheduling.md is a policy: of two prompts the short one is first."""
    page = next(page for page in guides() if page.name == "scheduling.md")
    names = usual(0)
    execute(python(page)[0], names)
    with paged_cache.ContinuousBatcher(
        names["model"], names["pool"], policy=names["ShortPromptsFirst"](), max_num_seqs=1
    ) as batcher:
        long, short = batcher.generate([[5] * 200, [6] * 3], max_new_tokens=2, progress_bar=False)

    assert short.metrics.queue_time < long.metrics.queue_time
