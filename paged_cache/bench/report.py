"""One report of all results in a folder: goals first, then tables, pictures and what they depend on."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidRequestError
from ..optional import not_installed
from .plots import draw
from .results import NotResultsError, Results
from .tables import case_text, environment_line, limit_text, markdown, value_text, warning, word

NO_PICTURES = f"No pictures: {not_installed('matplotlib')}."
LONGEST_VALUE = 200


@dataclass(frozen=True)
class Chapter:
    """One file of results, and its picture relative to the report, if there is one."""

    path: Path
    results: Results
    picture: str | None

    @property
    def anchor(self) -> str:
        """Where GitHub links to its heading."""
        return re.sub(r"[^\w\- ]", "", self.heading.lower()).replace(" ", "-")

    @property
    def heading(self) -> str:
        """The file's name: it is short, and no two are equal."""
        return self.path.stem


def write(folder: Path, output: Path) -> Path:
    """Writes the report of all JSON files in a folder, and pictures into a folder beside it that has its name.

    A picture beside a JSON file, with its name, is taken instead of one drawn here. Files that are no results are
    listed in the report.

    Raises:
        InvalidRequestError: There are no results in the folder. Nothing is written.
    """
    chapters, foreign = [], []
    can_draw = True
    for path in sorted(folder.glob("*.json")):
        try:
            results = Results.load(path)
        except NotResultsError as error:
            foreign.append(f"{path.name}: {str(error).removeprefix(f'{path} ')}")
            continue
        try:
            picture = _picture(path, results, output)
        except ModuleNotFoundError:
            picture, can_draw = None, False
        chapters.append(Chapter(path, results, picture))
    if not chapters:
        raise InvalidRequestError(
            f"{folder} has no results: JSON files that `paged-cache bench … --output-json` writes."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = [*_head(folder, output, chapters, foreign, can_draw), *(_chapter(chapter, output) for chapter in chapters)]
    output.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return output


def _picture(path: Path, results: Results, output: Path) -> str | None:
    beside = path.with_suffix(".png")
    drawn = beside if beside.exists() else draw(results, output.parent / output.stem / beside.name)
    return _relative(drawn, output) if drawn else None


def _relative(path: Path, output: Path) -> str:
    return Path(os.path.relpath(path, output.parent)).as_posix()


def _head(folder: Path, output: Path, chapters: list[Chapter], foreign: list[str], can_draw: bool) -> Iterator[str]:
    """Everything before the first chapter."""
    yield "# Measurements"
    yield (
        f"Made from the JSON files in `{_relative(folder, output)}/` by `paged-cache bench report`; not written by hand. "
        "Numbers are medians of rounds in which all candidates took turns, with the least and the most in brackets. "
        "Ratios are ours over theirs in the same round. Whoever has other tokens than the reference has no numbers."
    )
    yield "\n".join(f"- [{x.heading}](#{x.anchor}): {x.results.title}" for x in chapters)
    yield "## Goals"
    yield _goals(chapters)
    if foreign:
        yield "Not readable as results:\n\n" + "\n".join(f"- {text}" for text in foreign)
    if not can_draw:
        yield NO_PICTURES


def _goals(chapters: list[Chapter]) -> str:
    """A row per goal that something was measured for, and how many are met."""
    verdicts = [(chapter, verdict) for chapter in chapters for verdict in chapter.results.verdicts()]
    if not verdicts:
        return "There are none in these files: quick results have no goals."
    must = [verdict for _, verdict in verdicts if not verdict.goal.is_stretch]
    rows = [
        f"| [{chapter.heading}](#{chapter.anchor}) | {_cell(verdict.goal.text)}{' (stretch)' * verdict.goal.is_stretch} "
        f"| {limit_text(verdict)} | {value_text(verdict)} | {_cell(case_text(verdict.case))} | **{word(verdict)}** |"
        for chapter, verdict in verdicts
    ]
    head = "| measurement | goal | wanted | worst value | at | |\n| --- | --- | --- | --- | --- | --- |"
    count = f"{sum(verdict.is_met for verdict in must)} of {len(must)} goals are met"
    stretch = [verdict for _, verdict in verdicts if verdict.goal.is_stretch]
    count += f", and {sum(verdict.is_met for verdict in stretch)} of {len(stretch)} that go further" if stretch else ""
    return "\n".join([f"{count}.\n", head, *rows])


def _chapter(chapter: Chapter, output: Path) -> str:
    results = chapter.results
    parts = [f"## {chapter.heading}", f"{results.title}.", f"```\n{results.command}\n```"]
    parts += [f"![{results.title}]({chapter.picture})"] if chapter.picture else []
    parts += [markdown(results).strip()]
    parts += [f"Settings: {_settings(results.settings)}."] if results.settings else []
    parts += [f"Measured on {environment_line(results)}. {warning(results)}".strip()]
    return "\n\n".join([*parts, f"Samples: [{chapter.path.name}]({_relative(chapter.path, output)})."])


def _settings(settings: dict[str, Any]) -> str:
    texts = (f"{name.replace('_', ' ')} `{value}`" for name, value in settings.items() if value is not None)
    return ", ".join(text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…`" for text in texts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
