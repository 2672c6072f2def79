"""The site of the documentation: `make docs`. Pages are Markdown that reads as well without it."""

import re
import shutil
from os.path import relpath
from pathlib import Path
from typing import Any

import paged_cache

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "paged-cache"
author = "The paged-cache contributors"
release = version = paged_cache.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"paged-cache {version}"
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_heading_anchors = 4  # links to headings, as on GitHub
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"  # docstrings mark code as Markdown does
napoleon_use_ivar = True  # attributes of a class are a list, not entries of the index beside the fields themselves
napoleon_use_rtype = False

# Attributes that share a line in a docstring, as "allocated, freed: Blocks ...": Sphinx takes the names for types.
SHARE_A_LINE = """
    allocated at_most blocks_in_use contiguous evictions forward_seconds freed metric num_grouped_forwards
    num_prompt_tokens num_running num_waiting offloaded ours padded peak_blocks_in_use prefix_queries scores
"""

# `nitpicky` reports every type without an entry in this reference. What has none, and why:
nitpick_ignore_regex = [
    ("py:class", r"(torch|transformers|prometheus_client)\..*|CollectorRegistry"),  # other libraries' own documentation
    ("py:class", r"(collections\.abc|pathlib|os)\..*"),  # Python's; no network while this is built
    ("py:class", r"paged_cache\.(batching\.(request|batcher|events)|pool_map|patching|model_spec|memory\.layout)\.\w+"),
    ("py:class", r"paged_cache\.(planning\.(weights|states|kinds)|observability\.families)\.\w+"),  # ours, not public
    ("py:class", "|".join(SHARE_A_LINE.split())),
    ("py:class", r"dict\[str"),  # the alias Case, which Sphinx cuts at its comma
]

# Markdown beside the code, copied into the site.
COPIES = {
    path: HERE / "_repo" / path.relative_to(ROOT)
    for pattern in ("*.md", "benchmarks/*.md", "paged_cache/assets/*/*.md", "paged_cache/bench/data/*.md")
    for path in sorted(ROOT.glob(pattern))
}
LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def with_links(text: str, source: Path, page: Path) -> str:
    """The Markdown of `source` with links that hold on `page`; folders have no page, so they lose theirs."""

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match.groups(default="")
        target = (source.parent / path).resolve()
        return text if target.is_dir() else f"[{text}]({relpath(COPIES.get(target, target), page.parent)}{anchor})"

    return LINK.sub(link, text)


def copy_pages(app: Any) -> None:
    """Write the copies, and leave none of files that are gone."""
    shutil.rmtree(HERE / "_repo", ignore_errors=True)
    for source, page in COPIES.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(with_links(source.read_text(encoding="utf-8"), source, page), encoding="utf-8")


def read_page(app: Any, name: str, content: list[str]) -> None:
    """Links of the pages in here lead to the copies."""
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md" and page not in COPIES.values():
        content[0] = with_links(content[0], page, page)


def keep_sentence(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a property's docstring for its type: a dash says the same."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(": ", " – ")


def only_modules_with_source(app: Any) -> list[Any]:
    """What has no source, such as builtins, gets no link in the list of modules; called before viewcode writes it."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)  # before napoleon's
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", read_page)
    app.connect("html-collect-pages", only_modules_with_source, priority=400)  # before viewcode's
