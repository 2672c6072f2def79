"""Every command in the Markdown exists and takes the options that it is given.

Only the arguments are read: what the pages ask for takes minutes to hours, or needs a GPU, another environment or the network. Run are
plans and `make help`; `make` else says what it would do, extras of `pip` are looked up, `git` and `pre-commit` are not checked.
`test_commands_run.py` runs each subcommand of `paged-cache` at a small size, `tests/test_examples.py` the examples.
"""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.core
import typer.main

from paged_cache.assets import MODEL_PATH
from paged_cache.cli import app
from tests.docs.pages import ROOT, blocks, name, pages, prose

PROGRAM = re.compile(r"^(?:\.venv[\w-]*/bin/)?(paged-cache|python|make|pip|\.ci/run|git|pre-commit)(?= |$)")
# Placeholders of the reader's own values.
INSTEAD = [
    (r"<[^>]*>", "value"),
    (r"(--[\w-]+|=) ?…", r"\1 value"),
    (r"\s*(…|\.\.\.)", ""),
    (r"bench_x\.py", "bench_memory.py"),
]
NOT_CHECKED = {"git": "needs the repository's address", "pre-commit": "installs hooks into the checkout"}


class Command(NamedTuple):
    """What a reader may type, and where it says so."""

    page: Path
    text: str

    @property
    def words(self) -> list[str]:
        """As the shell splits it, without the comment behind it."""
        text = self.text
        for pattern, value in INSTEAD:
            text = re.sub(pattern, value, text)
        return shlex.split(text, comments=True)


def lines(page: Path) -> Iterator[str]:
    """Lines of blocks that show a terminal, continued ones joined, and code between backticks."""
    for block in blocks(page):
        if block.language in ("", "sh", "bash", "console"):
            text = re.sub(r"\\\n\s*", "", block.text)
            yield from (part.strip().removeprefix("$ ") for line in text.splitlines() for part in line.split("&&"))
    yield from (re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page)))


def commands(program: str) -> list[Command]:
    """All different commands of a program."""
    found: dict[str, Command] = {}
    for page in pages():
        for line in lines(page):
            match = PROGRAM.match(line)
            if match and match[1] == program and not re.search(r" … ?--", line):  # … stands for a subcommand
                found.setdefault(line, Command(page, line))
    return list(found.values())


def label(command: Any) -> str:
    """For the list of tests."""
    return f"{name(command.page)}: {command.text}"


class Parsed(BaseException):
    """The arguments were read: nothing is run."""


def reads_arguments(script: Path) -> bool:
    """Whether a script, or a module beside it that it imports, has a parser."""
    text = script.read_text(encoding="utf-8")
    beside = [script.with_name(f"{module}.py") for module in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    files = [path for path in [script, *beside] if path.is_file()]
    return any(re.search(r"parse_args|typer\.run|app\(\)", path.read_text(encoding="utf-8")) for path in files)


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end when they know what is asked of them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: Any, *args: Any) -> Any:
        parse(self, *args)
        raise Parsed

    def stop(*_: Any) -> None:
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", stop)


def forget_neighbours(folder: Path) -> None:
    """Scripts import modules beside them; the next script may mean others by these names."""
    for module, value in list(sys.modules.items()):
        file = getattr(value, "__file__", None)
        if file and folder in Path(file).parents:
            del sys.modules[module]


def without_work(command: Any, runs: list[str]) -> None:
    """Subcommands note that they were called, and do nothing."""
    if members := getattr(command, "commands", None):
        for member in members.values():
            without_work(member, runs)
    else:
        command.callback = lambda **_: runs.append(command.name)


def is_a_name(group: Any, words: list[str]) -> bool:
    """Whether the words only name a subcommand, as sentences do, and ask for nothing."""
    for word in words:
        group = getattr(group, "commands", {}).get(word)
    return group is not None


@pytest.mark.parametrize("command", commands("paged-cache"), ids=label)
def test_paged_cache_takes_the_options(command: Command) -> None:
    """A subcommand with these options and arguments exists."""
    runs: list[str] = []
    group = typer.main.get_command(app)
    arguments = command.words[1:]
    if is_a_name(group, arguments) or "--version" in arguments:
        arguments = [*arguments, "--help"]
    without_work(group, runs)
    with pytest.raises(SystemExit) as end:
        group.main(arguments, prog_name="paged-cache")

    assert not end.value.code, f"see `{command.text}` in {name(command.page)}"
    assert runs or "--help" in arguments


@pytest.mark.parametrize(
    "command", [c for c in commands("paged-cache") if re.match(r"plan <\w+>", c.text[12:])], ids=label
)
def test_plans_are_made(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """What is cheap is run: the memory of the package's model is planned."""
    words = shlex.split(re.sub(r"<\w+>", str(MODEL_PATH), command.text))
    with pytest.raises(SystemExit) as end:
        typer.main.get_command(app).main(words[1:], prog_name="paged-cache")

    assert not end.value.code
    assert "blocks" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands("python"), ids=label)
def test_scripts_take_the_options(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script exists and reads these arguments; it stops there."""
    arguments = command.words[1:]
    if arguments[0].startswith("-"):
        pytest.skip("python's own options")
    script = ROOT / arguments[0]
    assert script.is_file(), f"see `{command.text}` in {name(command.page)}"
    if not reads_arguments(script):
        assert len(arguments) == 1, f"{script.name} takes no options"
        return

    monkeypatch.setattr(sys, "argv", [str(script), *arguments[1:]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    stop_after_parsing(monkeypatch)
    try:
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        forget_neighbours(script.parent)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` as a reader's shell runs it, also if `make test` is what runs this."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("command", commands("make"), ids=label)
def test_make_knows_the_targets(command: Command, tmp_path: Path) -> None:
    """`make` says what it would do."""
    variables = [f"VENV={tmp_path / 'venv'}"] if "help" not in command.words else []
    result = subprocess.run(
        ["make", "-n", *command.words[1:], *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("command", commands("pip"), ids=label)
def test_extras_exist(command: Command) -> None:
    """What `pip install '.[…]'` names is in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = [extra for word in command.words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")]

    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras), command.text


def test_nothing_in_a_terminal_is_left_out() -> None:
    """Each line of a block of shell is a command that these tests know."""
    unknown = [
        f"{name(block.page)}:{block.line} {line}"
        for page in pages()
        for block in blocks(page)
        if block.language in ("sh", "bash")
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines()
        if line.strip()
        and not line.startswith("#")
        and not PROGRAM.match(line)
        and not line.startswith(("cd ", "export "))
    ]

    assert not unknown


@pytest.mark.parametrize("arguments", [["help"], ["-n"]], ids=" ".join)
def test_make_lists_its_targets(arguments: list[str]) -> None:
    """`make`, alone too, runs and names each target."""
    result = make(*arguments)

    assert result.returncode == 0
    if arguments == ["help"]:
        targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {"demo", "docs", "test"} <= set(targets)
        assert all(f"make {target} " in result.stdout for target in targets)


def test_commands_are_found() -> None:
    """The search sees those in blocks and those between backticks."""
    texts = {command.text for program in ("make", "python", "pip") for command in commands(program)}

    assert {"make demo", "pip install ."} <= {text.partition("#")[0].strip() for text in texts}
    assert any(text.startswith("python benchmarks/") for text in texts)
    assert all(commands(program) for program in NOT_CHECKED if program == "git")
