"""Draws a `PoolMap` as one HTML page that needs nothing else."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from ..block_marks import (
    CACHED_COLOR,
    FREE_COLOR,
    INK,
    OTHERS_COLOR,
    ROW_COLORS,
    SHARED_COLOR,
    color,
    row_color,
    symbol,
)
from ..pool_map import BlockState, Owner, PoolMap

STYLE = f"""
:root {{ color-scheme: light dark; --paper: #fff; --text: {INK}; --line: #aab1bc; --free: {FREE_COLOR}; --dim: #5b6472; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171d; --text: #e6e9ef; --line: #4a5260; --free: #20252e; --dim: #9aa4b2; }}
}}
body {{ background: var(--paper); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }} p, dt {{ color: var(--dim); }}
.blocks {{ display: flex; flex-wrap: wrap; gap: 2px; }}
i {{ --fill: 100%; background: linear-gradient(to top, var(--color) var(--fill), var(--free) var(--fill)); border: 1px solid var(--line);
  border-radius: 3px; box-sizing: border-box; color: {INK}; font: 11px/22px ui-monospace, monospace; height: 24px; min-width: 24px;
  padding: 0 2px; text-align: center; }}
i.free {{ background: var(--free); color: var(--text); }}
i.partly {{ color: var(--text); text-shadow: 0 0 3px var(--paper), 0 0 3px var(--paper); }}
i.cached {{ background: repeating-linear-gradient(45deg, {CACHED_COLOR} 0 4px, #dfe3e9 4px 7px); }}
table {{ border-spacing: 0 4px; }} th {{ font-weight: 600; padding-right: 1rem; text-align: left; vertical-align: top; white-space: nowrap; }}
td:nth-child(2) {{ color: var(--dim); padding-right: 1rem; text-align: right; vertical-align: top; white-space: nowrap; }}
dl {{ display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 1rem 0; }} dl div {{ align-items: center; display: flex; gap: .5rem; }}
dt i {{ display: inline-block; }} dd {{ margin: 0; }}
"""


def save_html(pool_map: PoolMap, path: Path, title: str = "The pool") -> None:
    """Writes the blocks, a legend, and the block table of every row. Pointing at a block says all about it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_lines(pool_map, title)), encoding="utf-8")


def _lines(pool_map: PoolMap, title: str) -> Iterator[str]:
    yield f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{pool_map.summary}</p>"
    yield from _legend(pool_map)
    yield '<div class="blocks" id="pool">'
    for number, block in enumerate(pool_map.blocks):
        yield _cell(pool_map, number, symbol(pool_map, block))
    yield "</div>\n<h2>Block tables</h2>\n<p>The blocks of each row, in order.</p>"
    yield "<table>"
    for index, owner in enumerate(pool_map.owners):
        yield from _tables(pool_map, index, owner)
    yield "</table>\n</body>\n</html>\n"


def _cell(pool_map: PoolMap, number: int, mark: str) -> str:
    """One block: its mark, and in words what it is."""
    block = pool_map.blocks[number]
    kind, style = _look(block, pool_map.block_size)
    about = escape(_about(pool_map, number, block), quote=True)
    return f'<i class="{kind}"{style} title="{about}">{escape(mark)}</i>'


def _look(block: BlockState, block_size: int) -> tuple[str, str]:
    """Class and style: coloured as far up as the block is filled."""
    if block.kind != "referenced":
        return block.kind, ""
    share = block.num_tokens / block_size if block.owners else 1.0
    fill = "" if share >= 1 else f";--fill:{share:.0%}"
    return "partly" if share < 1 else "full", f' style="--color:{color(block)}{fill}"'


def _about(pool_map: PoolMap, number: int, block: BlockState) -> str:
    """All that is known of a block."""
    if block.kind != "referenced":
        return f"block {number}: {block.kind}"
    owners = [pool_map.owners[index] for index in block.owners]
    whose = ", ".join(f"{owner.name} ({owner.letter})" for owner in owners) or "others"
    tokens = f", {block.num_tokens} of {pool_map.block_size} tokens" if owners else ""
    shared = f"shared, {block.num_refs} references" if block.is_shared else "1 reference"
    return f"block {number}: in use, {shared}, of {whose}{tokens}"


def _tables(pool_map: PoolMap, index: int, owner: Owner) -> Iterator[str]:
    for group, table in enumerate(owner.tables):
        where = f", layer group {group}" if len(owner.tables) > 1 else ""
        letter = f'<i class="full" style="--color:{row_color(index)}">{owner.letter}</i>'
        blocks = "".join(_cell(pool_map, block, str(block)) for block in table if block >= 0)
        yield f'<tr><th scope="row">{letter} {escape(owner.name)}{where}</th><td>{owner.num_tokens} tokens</td>'
        yield f'<td><div class="blocks">{blocks}</div></td></tr>'


def _legend(pool_map: PoolMap) -> Iterator[str]:
    entries = [
        (
            "full",
            f' style="--color:{ROW_COLORS[0]}"',
            "A",
            "of one row: its letter and colour, as far up as it is filled",
        ),
        ("full", f' style="--color:{SHARED_COLOR}"', "2", f"{pool_map.num_shared} shared by so many rows"),
        ("cached", "", "~", f"{pool_map.count('cached')} cached: nobody's, kept for the next prompt like it"),
        ("free", "", "·", f"{pool_map.count('free')} free"),
    ]
    if any(block.kind == "referenced" and not block.owners for block in pool_map.blocks):
        entries.append(("full", f' style="--color:{OTHERS_COLOR}"', "?", "of others"))
    yield "<dl>"
    for kind, style, mark, text in entries:
        yield f'<div><dt><i class="{kind}"{style}>{mark}</i></dt><dd>{text}</dd></div>'
    yield "</dl>"
