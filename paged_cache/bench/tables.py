"""Tables of results: for a terminal, and in Markdown."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .metrics import Metric, ratio_text
from .results import Case, Line, Results, Spread, Verdict

BUSY = 1.5
"""Load of the machine, before anything was measured, from which on times are doubted."""
FEW_CASES = 3
"""So many get tables of their own."""
GAP = 2
Cell = tuple[str, str]
"""What must be read, and what may be dim or in a second line."""


@dataclass
class Grid:
    """A table without its looks.

    Attributes:
        title: What all rows have in common.
        header: Of all columns.
        num_keys: Columns on the left that say what a row is about; the others are numbers.
        rows: Cells, as many as columns.
        notes: Below the table: why there are no numbers.
    """

    title: str
    header: list[str]
    num_keys: int
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def part(self, columns: list[int]) -> "Grid":
        """The keys, and some of the other columns."""
        kept = [*range(self.num_keys), *columns]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Grid(self.title, [self.header[i] for i in kept], self.num_keys, rows)


def show(results: Results, console: Console) -> None:
    """Prints what was found: samples, ratios, goals, and what they depend on."""
    console.print(Text(results.title, style="bold"))
    show_grids(results, console)
    verdicts = list(results.verdicts())
    if verdicts:
        console.print()
    for verdict in verdicts:
        style = "green" if verdict.is_met else "yellow" if verdict.goal.is_stretch else "bold red"
        console.print(Text.assemble((f"{word(verdict):>6}", style), f"  {goal_line(verdict)}"))
    console.print(Text(f"\n{environment_line(results)}", style="dim"))
    if warning(results):
        console.print(Text(warning(results), style="bold red"))


def show_grids(results: Results, console: Console) -> None:
    """Prints samples and ratios alone."""
    for grid in grids(results):
        if grid.rows:
            console.print()
            print_grid(grid, console)
            for note in grid.notes:
                console.print(Text(note, style="yellow"))


def markdown(results: Results) -> str:
    """The same for a report, without a title of its own."""
    parts = [_markdown_table(grid) for grid in grids(results) if grid.rows]
    goals = [f"- **{word(verdict)}**: {goal_line(verdict)}" for verdict in results.verdicts()]
    return "\n\n".join([*parts, *(["\n".join(goals)] if goals else [])]) + "\n"


def grids(results: Results) -> Iterator[Grid]:
    """Samples by case and candidate, then ratios; few cases have tables of their own."""
    cases, keys = results.cases(), varying(results.cases())
    groups = [([case], list[str]()) for case in cases] if len(cases) <= FEW_CASES else [(cases, keys)]
    for some, columns in groups:
        yield samples(results, some, columns)
        yield _ratios(results, some, columns)


def varying(cases: list[Case]) -> list[str]:
    """Keys whose values differ between cases, in the order in which they come up."""
    names = dict.fromkeys(name for case in cases for name in case)
    return [name for name in names if any(case.get(name) != cases[0].get(name) for case in cases)]


def case_text(case: Case) -> str:
    """`batch 8, context 512`."""
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in case.items())


def word(verdict: Verdict) -> str:
    """Whether a goal is met."""
    if verdict.goal.is_stretch:
        return "met" if verdict.is_met else "missed"
    return "met" if verdict.is_met else "MISSED"


def goal_line(verdict: Verdict) -> str:
    """The goal, what it is about, and the worst value."""
    stretch = " (stretch)" if verdict.goal.is_stretch else ""
    where = f" at {case_text(verdict.case)}" if verdict.case else ""
    return f"{verdict.goal.text}{stretch}: {value_text(verdict)}{where}, wanted {limit_text(verdict)}"


def value_text(verdict: Verdict) -> str:
    """The ratio, or the value with its unit; with more digits where it would look like the limit that it misses."""
    text = _of_goal(verdict, verdict.value)
    if verdict.is_met or text != _of_goal(verdict, verdict.goal.limit):
        return text
    return f"{verdict.value:.5g}{text.lstrip('-.,0123456789')}"


def limit_text(verdict: Verdict) -> str:
    """`at most 1.3`."""
    return f"at {'least' if verdict.goal.at_most is None else 'most'} {_of_goal(verdict, verdict.goal.limit)}"


def environment_line(results: Results) -> str:
    """Device, threads, load, versions, commit and date, as far as they are known."""
    found = results.environment
    names = {"threads": "{} threads", "load": "load {}", "python": "Python {}"}
    parts = [str(found.get("device", "unknown device"))]
    parts += [text.format(found[name]) for name, text in names.items() if found.get(name) is not None]
    parts += [f"{name} {version}" for name, version in found.get("versions", {}).items()]
    parts += [f"{name} {found[name]}" for name in ("commit", "seed") if found.get(name) is not None]
    parts += [str(found["date"])] if found.get("date") else []
    parts += [f"with rounds of {one.get('commit')}" for one in found.get("earlier", [])]
    return ", ".join(parts)


def warning(results: Results) -> str:
    """What makes one doubt the times; empty if nothing does."""
    load = results.environment.get("load") or 0
    return f"WARNING: other jobs kept this machine busy (load {load:g})." if load > BUSY else ""


def _of_goal(verdict: Verdict, value: float) -> str:
    metric = Metric(verdict.goal.metric)
    if verdict.goal.peer:
        return ratio_text(Spread(value, value, value))
    unit = f" {metric.unit}" if metric.unit in ("ms", "us", "s", "/s", "GB/s") else ""
    return metric.number(value) + unit


def samples(results: Results, cases: list[Case], keys: list[str]) -> Grid:
    """A row per case and candidate, a column per metric that anybody has; `keys` are columns, too."""
    lines = [line for case in cases for line in results.lines if line.case == case]
    metrics = [Metric(name) for name in results.columns if any(line.metrics.get(name) for line in lines)]
    rows = [
        [*_keys(line.case, keys), (line.candidate, ""), *(_cell(line, metric) for metric in metrics)] for line in lines
    ]
    title = case_text({name: value for name, value in cases[0].items() if name not in keys}) if cases else ""
    header = [*(key.replace("_", " ") for key in keys), "", *(metric.label for metric in metrics)]
    return Grid(title, header, len(keys) + 1, rows, _notes(lines))


def _notes(lines: list[Line]) -> list[str]:
    """Each once, with the number of cases if there are several."""
    counts = Counter(f"{line.candidate}: {line.note}" for line in lines if line.note)
    return [note if count == 1 else f"{note} (in {count} cases)" for note, count in counts.items()]


def _cell(line: Line, metric: Metric) -> Cell:
    return metric.spread(line.spread(metric.name)) if line.metrics.get(metric.name) else ("-", "")


def _ratios(results: Results, cases: list[Case], keys: list[str]) -> Grid:
    """A row per case, metric and pair."""
    rows = []
    peers = [name for name in results.candidates() if name not in results.ours]
    only = results.ours[0] if len(results.ours) == 1 else ""
    for case in cases:
        for metric, ours, peer in ((m, a, b) for m in results.compared for a in results.ours for b in peers):
            ratio = results.ratio(case, metric, ours, peer)
            if ratio:
                names = [(peer if only else f"{ours} / {peer}", ""), (Metric(metric).label, "")]
                rows.append(
                    [*_keys(case, keys), *names, _split(ratio_text(ratio)), (Metric(metric).verdict(ratio), "")]
                )
    header = [*(key.replace("_", " ") for key in keys), f"{only} /".strip(), "of", "ratio", f"{only} is".strip()]
    if not any(row[-1][0] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Grid("", header, len(keys) + 2, rows)


def _split(text: str) -> Cell:
    median, _, rest = text.partition(" ")
    return median, rest


def _keys(case: Case, keys: list[str]) -> list[Cell]:
    return [(_value(case.get(key, "")), "") for key in keys]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def print_grid(grid: Grid, console: Console) -> None:
    """As one table if it fits: with spreads beside medians, or else below them; otherwise in parts."""
    for in_lines in (False, True):
        widths = _widths(grid, in_lines)
        if _total(widths) <= console.width or (in_lines and len(grid.header) <= grid.num_keys + 1):
            is_roomy = _total([max(pair) for pair in zip(map(len, grid.header), widths, strict=True)]) <= console.width
            header = grid.header if is_roomy else [fill(*pair) for pair in zip(grid.header, widths, strict=True)]
            console.print(_rich(grid, header, in_lines))
            return
    columns = list(range(grid.num_keys, len(grid.header)))
    print_grid(grid.part(columns[: len(columns) // 2]), console)
    console.print()
    print_grid(grid.part(columns[len(columns) // 2 :]), console)


def _widths(grid: Grid, in_lines: bool) -> list[int]:
    """The least of each column; headers may be broken between words."""
    widths = [max(map(len, name.split(" "))) for name in grid.header]
    for row in grid.rows:
        for i, (text, dim) in enumerate(row):
            widths[i] = max(widths[i], *((len(text), len(dim)) if in_lines else (len(f"{text} {dim}".strip()), 0)))
    return [max(width, 1) for width in widths]


def _total(widths: list[int]) -> int:
    """Width of the printed table."""
    return sum(widths) + GAP * (len(widths) - 1)


def _rich(grid: Grid, header: list[str], in_lines: bool) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        title=grid.title or None,
        title_justify="left",
        title_style="italic",
    )
    for i, name in enumerate(header):
        justify: Any = "left" if i < grid.num_keys else "right"
        table.add_column(name, justify=justify, header_style="bold", no_wrap=name == "")
    gap = "\n" if in_lines else " "
    for cells, is_last in _with_ends(grid):
        row = [Text.assemble(text, (gap + dim, "dim")) if dim else Text(text) for text, dim in cells]
        table.add_row(*row, end_section=is_last)
    return table


def _with_ends(grid: Grid) -> Iterator[tuple[list[Cell], bool]]:
    """Rows, and whether the next one is about another case; repeated keys of a case are left out."""
    for _, group in groupby(grid.rows, key=lambda row: row[: grid.num_keys - 1]):
        rows = list(group)
        for i, row in enumerate(rows):
            keys = row[: grid.num_keys - 1] if i == 0 else [("", "")] * (grid.num_keys - 1)
            yield [*keys, *row[grid.num_keys - 1 :]], i == len(rows) - 1


def _markdown_table(grid: Grid) -> str:
    lines = [grid.header, ["---" if i < grid.num_keys else "---:" for i in range(len(grid.header))]]
    lines += [[" ".join(filter(None, cell)).replace("|", "\\|") for cell in row] for row in grid.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(filter(None, [grid.title, text, "\n".join(f"- {note}" for note in grid.notes)]))
