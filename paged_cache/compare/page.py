"""Pictures of a comparison: a PNG with all panels, and one HTML page that needs no other file."""

import base64
import html
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.metrics import Metric
from ..bench.results import Line, Results
from ..optional import not_installed, require
from .findings import findings
from .measuring import SECTIONS, section
from .panels import Panel, draw, drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = 0.9
"""Inches above the panels, for the title."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.dim { color: #5b6270; font-size: .9rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; } figure img { width: 100%; } figcaption { font-size: .95rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } td.note { text-align: left; white-space: normal; }
tr.ours td { background: #eef8f2; } .spread { color: #5b6270; font-size: .8rem; }
code { background: #f4f5f7; padding: .1rem .3rem; }
"""


def save_png(results: Results, path: Path) -> None:
    """All panels that there are numbers for.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = drawable(results)
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns)
    width, height = 6.4 * columns, 4.4 * rows + HEAD
    layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15, rect=(0, 0, 1, 1 - HEAD / height))
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    figure.text(
        0.5, 1 - 0.3 / height, results.title, fontsize=13, fontweight="bold", ha="center", va="center", parse_math=False
    )
    lines = textwrap.fill(origin(results), round(14 * width))
    figure.text(0.5, 1 - 0.5 / height, lines, fontsize=8.5, color="#5b6270", ha="center", va="top", parse_math=False)
    for i, panel in enumerate(panels):
        draw(panel, figure.add_subplot(rows, columns, i + 1), results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def save_html(results: Results, path: Path) -> None:
    """The page; without plots where matplotlib is not installed."""
    try:
        figures = [_figure(panel, results) for panel in drawable(results)]
        plots = f'<div class="panels">{"".join(figures)}</div>'
    except ModuleNotFoundError:
        plots = f"<p>No plots: {html.escape(not_installed('matplotlib'))}.</p>"
    parts = [
        f"<h1>{html.escape(results.title)}</h1>",
        f'<p class="dim"><code>{html.escape(results.command)}</code><br>{html.escape(origin(results))}</p>',
        "<h2>What was found</h2>",
        "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in findings(results)) + "</ul>",
        plots,
        *(_table(results, name) for name in SECTIONS if section(results, name).lines),
        f'<p class="dim">{html.escape(_how(results))}</p>',
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(results.title)}</title><style>{STYLE}</style>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{chr(10).join(parts)}\n</body></html>\n',
        encoding="utf-8",
    )


def _figure(panel: Panel, results: Results) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.1), layout="constrained", facecolor="white")
    draw(panel, figure.subplots(), results)
    source = f"data:image/svg+xml;base64,{_svg(figure)}"
    caption = f"<figcaption>{html.escape(panel.text)}</figcaption>"
    return f'<figure id="{panel.name}"><img alt="{html.escape(panel.title)}" src="{source}">{caption}</figure>'


def _svg(figure: "Figure") -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return base64.b64encode(file.getvalue()).decode()


def _table(results: Results, title: str) -> str:
    found, key = section(results, title), SECTIONS[title].key
    names = [name for name in found.columns if any(name in line.metrics for line in found.lines)]
    header = "".join(f"<th>{html.escape(text)}</th>" for text in (key.replace("_", " "), "", *map(_label, names)))
    rows = "".join(_row(line, key, names, results.ours) for line in found.lines)
    return f"<h2>{SECTIONS[title].title}</h2><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"


def _row(line: Line, key: str, names: list[str], ours: list[str]) -> str:
    cells = f"<td>{line.case[key]:,}</td><td>{html.escape(line.candidate)}</td>"
    if line.note:
        cells += f'<td class="note" colspan="{len(names)}">{html.escape(line.note)}</td>'
    else:
        cells += "".join(f"<td>{_cell(line, name)}</td>" for name in names)
    return f"<tr{' class=ours' if line.candidate in ours else ''}>{cells}</tr>"


def _cell(line: Line, name: str) -> str:
    if name not in line.metrics:
        return "-"
    median, spread = Metric(name).spread(line.spread(name))
    return f'{median} <span class="spread">{spread}</span>'


def _label(name: str) -> str:
    return Metric(name).label


def origin(results: Results) -> str:
    """Machine, prompts and versions: what figures depend on."""
    found, settings = results.environment, results.settings
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    lengths = results.details["prompt_lengths"]
    quick = "--quick: figures say nothing; " if settings["is_quick"] else ""
    return (
        f"{quick}{settings['parameters'] / 1e6:.1f} M parameters, {settings['dtype']}, on {found.get('device')} with "
        f"{found.get('threads')} torch threads; {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens; {versions}, "
        f"commit {found.get('commit')}, seed {found.get('seed')}"
    )


def _how(results: Results) -> str:
    settings = results.settings
    repeated = "Given prompts repeat where more are needed, and the batcher reuses what it has. "
    return (
        f"Medians of {settings['rounds']} rounds, in which all take turns after a round to warm up, with the least and the "
        "most in brackets. Every text has as many tokens as was asked for, whatever it says; without a cache it has "
        f"{settings['num_new_without_cache']} at most. {repeated if settings['prompts'] else ''}Batches smaller than the "
        "largest are run for their memory only. A StaticCache has the next power of two of columns in batches, exactly as "
        "many as it needs where contexts are compared, and is not compiled. TTFT is the time to the first token, TPOT the "
        "time per token behind it, E2EL the time to the last one. Memory is that of keys and values: tensors of "
        "transformers' caches after the last step, and the most blocks that a PagedCache held. Of those who serve requests, "
        "allocated is the pool or cache as it was made (ContinuousBatcher: for all requests and a quarter more; generate_batch: "
        "for as many as it serves at a time), or the most that a growing cache had; in use is what requests held at their most, "
        "blocks and pages counted whole (generate_batch: those in tables of its requests). Identical: rows with the "
        "tokens of generate with a DynamicCache, alone."
    )
