"""Draws a `PoolMap`: `as_text` for a terminal, `save_png` for everything else."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.text import Text

from .block_marks import CACHED, CACHED_COLOR, FREE, FREE_COLOR, OTHERS, ROW_COLORS, SHARED_COLOR
from .block_marks import INK as INK
from .block_marks import color as color
from .block_marks import row_color as row_color
from .block_marks import symbol as symbol
from .pool_map import BlockState, Owner, PoolMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    per_line = max(32, round((len(pool_map.blocks) * 3) ** 0.5 / 16) * 16)
    tables = [(i, owner, table) for i, owner in enumerate(pool_map.owners) for table in owner.tables]
    heights = [-(-len(pool_map.blocks) // per_line), max(len(tables), 1)]
    figure = Figure(figsize=(12, 0.27 * sum(heights) + 2.2), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, height_ratios=[1.2 * heights[0], heights[1]])
    _draw_pool(upper, pool_map, per_line)
    _draw_tables(lower, pool_map, tables)
    upper.set_title(f"{title}: {pool_map.summary}", loc="left", fontsize=11, color=INK, fontweight="bold")
    lower.set_title(
        "Block tables: the blocks of each row, in order", loc="left", fontsize=11, color=INK, fontweight="bold"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_pool(axes: "Axes", pool_map: PoolMap, per_line: int) -> None:
    for i, block in enumerate(pool_map.blocks):
        mark = symbol(pool_map, block).upper() if block.kind == "referenced" else ""
        _draw_cell(axes, i % per_line, i // per_line, block, pool_map.block_size, mark)
    num_lines = -(-len(pool_map.blocks) // per_line)
    _frame(axes, per_line, num_lines, [str(i * per_line) for i in range(num_lines)])
    _png_legend(axes)


def _draw_tables(axes: "Axes", pool_map: PoolMap, tables: list[tuple[int, Owner, list[int]]]) -> None:
    for y, (_, _, table) in enumerate(tables):
        for x, block in enumerate(table):
            if block >= 0:  # else it went back to the pool, behind a window
                _draw_cell(axes, x, y, pool_map.blocks[block], pool_map.block_size, str(block), 6)
    width = max((len(table) for _, _, table in tables), default=1)
    _frame(axes, width, max(len(tables), 1), [f"{owner.name}  {owner.letter}" for _, owner, _ in tables])
    for label, (i, _, _) in zip(axes.get_yticklabels(), tables, strict=True):
        label.set_bbox({"facecolor": row_color(i), "edgecolor": "none", "pad": 1.5, "alpha": 0.55})


def _draw_cell(axes: "Axes", x: int, y: int, block: BlockState, block_size: int, mark: str, size: int = 8) -> None:
    """One block, coloured as far up as it is filled."""
    from matplotlib.patches import Rectangle

    fill = 0.88 * (block.num_tokens / block_size if block.owners else 1.0)
    hatch = "////" if block.kind == "cached" else None
    corner = (x + 0.06, y + 0.94 - fill)
    axes.add_patch(Rectangle(corner, 0.88, fill, facecolor=color(block), edgecolor="white", linewidth=0, hatch=hatch))
    axes.add_patch(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, facecolor="none", edgecolor="#aab1bc", linewidth=0.6))
    axes.text(x + 0.5, y + 0.52, mark, ha="center", va="center", fontsize=size, color=INK)


def _frame(axes: "Axes", width: int, height: int, labels: list[str]) -> None:
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[])
    axes.set_yticks([i + 0.5 for i in range(len(labels))], labels, fontsize=8, color=INK)
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
