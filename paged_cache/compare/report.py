"""`paged-cache compare` on the screen, and the files that it leaves."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..bench.metrics import Metric, ratio_text
from ..bench.results import Results, Spread
from ..bench.tables import Grid, environment_line, print_grid, samples, warning
from ..loading import few_threads, quiet
from ..optional import not_installed
from .findings import findings
from .measuring import IDENTICAL, SECTIONS, Comparison, faults, section
from .page import save_html, save_png
from .settings import Settings
from .subject import Subject, load_subject

NAME = "compare"
NOT_ON_SCREEN = {IDENTICAL, "p99_e2el_ms"}
"""Metrics that are in the files only."""
LEGEND = (
    "Medians, ratios with the least and the most; all spreads are in the files. TTFT: time to the first token, TPOT: per token "
    "behind it, E2EL: to the last one. KV allocated: bytes of the pool or cache; in use: those that requests held at their most."
)


def run(settings: Settings, output: Path, command: str, console: Console) -> bool:
    """Measures, shows, and writes `compare.json`, `compare.png` and `compare.html`.

    Args:
        settings: See there.
        output: Folder for the files, made if it is not there.
        command: What was typed, for the files.
        console: Where to write.

    Returns:
        Whether the tokens of ours are those of the reference; in 16 bits always, where there was no error.

    Raises:
        PagedCacheError: The model, or something asked of it, cannot be had; the message is one line.
    """
    start = time.perf_counter()
    with console.status(f"Loading {settings.model}"):
        subject = load_subject(settings)
    with few_threads(subject.model), quiet(), _quiet_peers():
        results = _measured(Comparison(subject), command, console)
    _show_findings(results, console)
    for name in SECTIONS:
        _show_section(results, name, console)
    console.print(Text(f"\n{LEGEND}", style="dim"))
    console.print(Text(f"{environment_line(results)}", style="dim"))
    console.print(Text(warning(results), style="bold red"), end="\n" if warning(results) else "")
    _write(results, output, console)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s[/]")
    return not faults(results)


@contextmanager
def _quiet_peers() -> Iterator[None]:
    """Hushes what transformers' batching logs when it fails: the tables have a note on it."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _measured(comparison: Comparison, command: str, console: Console) -> Results:
    _show_subject(comparison.subject, console)
    columns = [TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=comparison.num_runs)
        return comparison.run(
            command,
            tick=lambda name: progress.update(task, advance=1, description=name),
            skip=lambda runs: progress.update(task, advance=runs),
        )


def _show_subject(subject: Subject, console: Console) -> None:
    model, lengths = subject.model, [len(row) for row in subject.prompts]
    console.print(
        f"[bold]{Path(subject.settings.model).name}[/]: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M "
        f"parameters, {subject.settings.dtype} on {model.device}; {len(lengths)} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, {subject.settings.max_new_tokens} new ones"
    )


def _show_findings(results: Results, console: Console) -> None:
    console.rule("[bold]What was found[/]", align="left", style="dim")
    for number, text in enumerate(findings(results)):
        style = "bold red" if faults(results) and number == 0 else ""
        console.print(Text(f"• {text}", style=style))


def _show_section(results: Results, name: str, console: Console) -> None:
    """Medians, then ratios of one metric with their spread."""
    found, key = section(results, name), SECTIONS[name].key
    if not found.lines:
        return
    console.print()
    console.rule(f"[bold]{SECTIONS[name].title}[/]", align="left", style="dim")
    columns = [column for column in found.columns if column not in NOT_ON_SCREEN]
    grid = samples(replace(found, columns=columns), found.cases(), [key])
    rows = [[*row[:2], *((median, "") for median, _ in row[2:])] for row in grid.rows]
    print_grid(replace(grid, rows=rows), console)
    for note in grid.notes:
        console.print(Text(note, style="yellow"))
    if not results.settings["is_quick"] and (ratios := ratio_grid(found, key)).rows:
        console.print()
        print_grid(ratios, console)


def ratio_grid(found: Results, key: str) -> Grid:
    """Ours over each peer: a row per case, a column per peer."""
    (metric,), ours = found.compared, found.ours[0]
    peers = [name for name in found.candidates() if name != ours]
    ratios = {case[key]: [found.ratio(case, metric, ours, peer) for peer in peers] for case in found.cases()}
    kept = [i for i in range(len(peers)) if any(row[i] for row in ratios.values())]
    rows = [[(str(value), ""), *(_cell(row[i]) for i in kept)] for value, row in ratios.items() if any(row)]
    title = f"Ratios of {Metric(metric).label.partition(',')[0]}: {ours} / …"
    return Grid(title, [key.replace("_", " "), *(f"/ {peers[i]}" for i in kept)], 1, rows)


def _cell(ratio: Spread | None) -> tuple[str, str]:
    median, _, rest = ratio_text(ratio).partition(" ") if ratio else ("-", "", "")
    return median, rest


def _write(results: Results, output: Path, console: Console) -> None:
    paths = [results.save(output / f"{NAME}.json")]
    try:
        save_png(results, output / f"{NAME}.png")
        paths.append(output / f"{NAME}.png")
    except ModuleNotFoundError:
        console.print(f"No plots: {not_installed('matplotlib')}", style="yellow", markup=False, soft_wrap=True)
    save_html(results, output / f"{NAME}.html")
    paths.append(output / f"{NAME}.html")
    console.print(Text("\nwritten: " + ", ".join(map(str, paths))))
