"""`paged-cache compare` on the screen, and the files that it leaves."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..bench.results import Results
from ..bench.tables import environment_line, show_grids, warning
from ..loading import few_threads, quiet
from .findings import findings
from .measuring import Comparison, faults, part
from .page import PARTS, save_html, save_png
from .settings import Settings
from .subject import Subject, load_subject

NAME = "compare"


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
    for key, title in PARTS.items():
        if part(results, key).lines:
            console.rule(f"[bold]{title}[/]", align="left", style="dim")
            show_grids(part(results, key), console)
            console.print()
    _show_findings(results, console)
    console.print(Text(f"\n{environment_line(results)}", style="dim"))
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


def _write(results: Results, output: Path, console: Console) -> None:
    paths = [results.save(output / f"{NAME}.json")]
    try:
        save_png(results, output / f"{NAME}.png")
        paths.append(output / f"{NAME}.png")
    except ModuleNotFoundError:
        console.print(
            "No plots: matplotlib is not installed; run: pip install 'paged-cache[plots]'", style="yellow", markup=False
        )
    save_html(results, output / f"{NAME}.html")
    paths.append(output / f"{NAME}.html")
    console.print(Text("\nwritten: " + ", ".join(map(str, paths))))
