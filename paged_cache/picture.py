"""Draws a `PoolMap`: `as_text` for a terminal, `save_png` for everything else."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group
from rich.text import Text

from .block_marks import CACHED, CACHED_COLOR, FREE, FREE_COLOR, OTHERS, ROW_COLORS, SHARED_COLOR
from .block_marks import INK as INK
from .block_marks import color as color
from .block_marks import row_color as row_color
from .block_marks import symbol as symbol
from .optional import require
from .pool_map import BlockState, Owner, PoolMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_MARKS = 2048
"""Cells of a picture in which there is room for a letter or a number each."""
MOST_TABLES = 64
"""Block tables that a picture has room for."""
MOST_LINES = 27
"""Lines of blocks that have their number beside them; of more lines every second, third, ... one."""
TABLES = "Block tables: the blocks of each row, in order"


def as_text(pool_map: PoolMap, width: int = 80) -> Group:
    """Rows of cells, two columns each, that fit `width`, and a legend."""
    margin = len(str(len(pool_map.blocks))) + 2
    per_line = max((width - margin) // 2, 1)
    per_line -= per_line % 8 if per_line > 8 else 0
    lines = []
    for start in range(0, len(pool_map.blocks), per_line):
        line = Text(f"{start:>{margin - 2}}  ", style="dim")
        for block in pool_map.blocks[start : start + per_line]:
            line.append_text(_cell(symbol(pool_map, block), block))
        lines.append(line)
    return Group(*lines, Text(), *_legend(pool_map))


def save_text(pool_map: PoolMap, path: Path, width: int = 100) -> None:
    """Writes what `as_text` shows, without colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        Console(width=width, file=file, color_system=None).print(as_text(pool_map, width))


def _cell(character: str, block: BlockState) -> Text:
    style = "dim" if block.kind == "free" else f"bold {INK} on {color(block)}"
    return Text(f"{character} ", style=style, end="")


def _legend(pool_map: PoolMap) -> list[Text]:
    lines = [_names(name, owners, pool_map) for name, owners in pool_map.names.items()]
    states = [
        (
            BlockState("referenced", 2, (), 0),
            "2-9",
            f"{pool_map.num_shared} blocks shared by so many rows (+ for more)",
        ),
        (
            BlockState("cached", 0, (), 0),
            CACHED,
            f"{pool_map.count('cached')} cached: nobody's, kept for the next prompt like it",
        ),
        (BlockState("free", 0, (), 0), FREE, f"{pool_map.count('free')} free"),
    ]
    if any(block.kind == "referenced" and not block.owners for block in pool_map.blocks):
        states.append((BlockState("referenced", 1, (), 0), OTHERS, "others"))
    return lines + [
        Text.assemble("  ", _cell(mark, block), " " * (5 - len(mark)), text) for block, mark, text in states
    ]


def _names(name: str, owners: list[Owner], pool_map: PoolMap) -> Text:
    first = pool_map.owners.index(owners[0])
    marks = [Text(f"{o.letter} ", style=f"bold {INK} on {row_color(first + i)}") for i, o in enumerate(owners)]
    return Text.assemble("  ", *marks, f"  {name}")


def save_png(pool_map: PoolMap, path: Path, title: str = "The pool") -> None:
    """Draws the blocks and, below them, the block table of every row.

    Large pools get no letters and numbers, and only the first tables; the headings say so.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    per_line = max(32, round((len(pool_map.blocks) * 3) ** 0.5 / 16) * 16)
    all_tables = [(i, owner, table) for i, owner in enumerate(pool_map.owners) for table in owner.tables]
    tables = all_tables[:MOST_TABLES]
    line_height = 0.27 if len(pool_map.blocks) <= MOST_MARKS else 12 / per_line
    heights = [line_height * -(-len(pool_map.blocks) // per_line), 0.27 * max(len(tables), 1)]
    figure = Figure(figsize=(12, 2.2 + sum(heights)), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, height_ratios=[1.2 * heights[0], heights[1]])
    has_marks = _draw_pool(upper, pool_map, per_line)
    _head(upper, f"{title}: {pool_map.summary}", [] if has_marks else ["too many for letters"])
    has_numbers = _draw_tables(lower, pool_map, tables)
    notes = [f"the first {len(tables):,} of {len(all_tables):,}"] if len(tables) < len(all_tables) else []
    _head(lower, TABLES, notes + ([] if has_numbers else ["too many for numbers"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _head(axes: "Axes", text: str, notes: list[str]) -> None:
    """A heading as it is written: a `$` in a name begins no formula."""
    text = f"{text} ({', '.join(notes)})" if notes else text
    axes.set_title(text, loc="left", fontsize=11, color=INK, fontweight="bold", parse_math=False)


def _draw_pool(axes: "Axes", pool_map: PoolMap, per_line: int) -> bool:
    cells = [
        _Cell(i % per_line, i // per_line, block, symbol(pool_map, block).upper() if block.kind == "referenced" else "")
        for i, block in enumerate(pool_map.blocks)
    ]
    num_lines = -(-len(pool_map.blocks) // per_line)
    _frame(axes, per_line, num_lines, [str(i * per_line) for i in range(num_lines)], -(-num_lines // MOST_LINES))
    _png_legend(axes)
    return _draw_cells(axes, cells, pool_map.block_size, 8)


def _draw_tables(axes: "Axes", pool_map: PoolMap, tables: list[tuple[int, Owner, list[int]]]) -> bool:
    cells = [
        _Cell(x, y, pool_map.blocks[block], str(block))
        for y, (_, _, table) in enumerate(tables)
        for x, block in enumerate(table)
        if block >= 0  # else it went back to the pool, behind a window
    ]
    width = max((len(table) for _, _, table in tables), default=1)
    _frame(axes, width, max(len(tables), 1), [f"{owner.name}  {owner.letter}" for _, owner, _ in tables])
    for label, (i, _, _) in zip(axes.get_yticklabels(), tables, strict=True):
        label.set_bbox({"facecolor": row_color(i), "edgecolor": "none", "pad": 1.5, "alpha": 0.55})
    return _draw_cells(axes, cells, pool_map.block_size, 6)


class _Cell(NamedTuple):
    """A block, where it is drawn, and what is written on it."""

    x: int
    y: int
    block: BlockState
    mark: str


def _draw_cells(axes: "Axes", cells: list[_Cell], block_size: int, font_size: int) -> bool:
    """Blocks, each coloured as far up as it is filled; whether there was room for their marks."""
    plain = [cell for cell in cells if cell.block.kind != "cached"]
    cached = [cell for cell in cells if cell.block.kind == "cached"]
    for group, hatch in ((plain, None), (cached, "////")):
        fills = [0.88 * (block.num_tokens / block_size if block.owners else 1.0) for _, _, block, _ in group]
        colors = [color(cell.block) for cell in group]
        _draw_boxes(axes, group, fills, facecolors=colors, edgecolors="white", linewidths=0, hatch=hatch)
    has_marks = len(cells) <= MOST_MARKS
    outline = 0.6 if has_marks else 0.2
    _draw_boxes(axes, cells, [0.88] * len(cells), facecolors="none", edgecolors="#aab1bc", linewidths=outline)
    for x, y, _, mark in cells:
        if mark and has_marks:
            text = axes.text(x + 0.5, y + 0.52, mark, ha="center", va="center", fontsize=font_size, color=INK)
            text.set_in_layout(False)
    return has_marks


def _draw_boxes(axes: "Axes", cells: list[_Cell], heights: list[float], **style: Any) -> None:
    """Rectangles that stand on the lower edges of their cells, all at once."""
    from matplotlib.collections import PolyCollection
    from numpy import array, stack

    if not cells:
        return
    x, low = array([cell.x for cell in cells]), array([cell.y + 0.94 for cell in cells])
    left, right, high = x + 0.06, x + 0.94, low - array(heights)
    corners: Any = stack([left, low, right, low, right, high, left, high], axis=1)
    axes.add_collection(PolyCollection(corners.reshape(-1, 4, 2), **style), autolim=False).set_in_layout(False)


def _frame(axes: "Axes", width: int, height: int, labels: list[str], step: int = 1) -> None:
    """Names every `step`-th line."""
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[])
    places = [i + 0.5 for i in range(len(labels))]
    axes.set_yticks(places[::step], labels[::step], fontsize=8, color=INK, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _png_legend(axes: "Axes") -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(facecolor=ROW_COLORS[0], label="of one row (its letter), filled as far as its slots are used"),
        Patch(facecolor=SHARED_COLOR, label="shared (by how many rows)"),
        Patch(
            facecolor=CACHED_COLOR, hatch="////", edgecolor="white", label="cached: kept for the next prompt like it"
        ),
        Patch(facecolor=FREE_COLOR, edgecolor="#aab1bc", label="free"),
    ]
    axes.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0, 0), ncols=4, frameon=False, fontsize=8, handlelength=1.2
    )
