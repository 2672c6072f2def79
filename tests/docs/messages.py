"""Every message that the package gives: of errors, warnings and log lines, with … in the place of values."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.docs.pages import ROOT

HOLE = "…"
ERRORS = {"PagedCacheError", "OutOfBlocksError", "UnsupportedModelError", "InvalidRequestError", "PipelineTimeoutError"}
LOGGED = {"info", "warning", "error", "exception"}
SHORTEST = 12  # letters; what is shorter comes from somewhere else


class Message(NamedTuple):
    """A message, the module that gives it, and the error or level."""

    file: str
    line: int
    kind: str
    text: str


def template(node: ast.expr) -> list[str]:
    """The text of an expression; two, where it depends on a condition."""
    if isinstance(node, ast.Constant):
        return [node.value if isinstance(node.value, str) else HOLE]
    if isinstance(node, ast.JoinedStr):
        return ["".join(template(part)[0] for part in node.values)]
    if isinstance(node, ast.IfExp):
        return [*template(node.body), *template(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in template(value)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in template(node.left) for right in template(node.right)]
    return [HOLE]


def files() -> list[Path]:
    """The package, integrations through their folder at the root."""
    package = [path for path in (ROOT / "paged_cache").rglob("*.py") if "integrations" not in path.parts]
    return sorted([*package, *(ROOT / "integrations").rglob("*.py")])


def kind_of(call: ast.Call) -> str | None:
    """Which error a call makes, or on which level it logs."""
    if isinstance(call.func, ast.Name) and call.func.id in ERRORS:
        return call.func.id
    if isinstance(call.func, ast.Attribute):
        if call.func.attr in LOGGED and "log" in ast.unparse(call.func.value).lower():
            return call.func.attr
        if call.func.attr == "warn" and ast.unparse(call.func.value) == "warnings":
            return "warning"
    return None


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """The code, with the name of its file."""
    trees = [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in files()]
    return [(name, node) for name, tree in trees for node in ast.walk(tree)]


@functools.cache
def messages() -> list[Message]:
    """All with words of their own."""
    return list(_messages())


def _messages() -> Iterator[Message]:
    for name, node in nodes():
        if isinstance(node, ast.Call) and (kind := kind_of(node)):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            for text in (text for argument in arguments for text in template(argument)):
                filled = re.sub(r"%[-.\d]*[srdfx]", HOLE, text) if kind in LOGGED else text
                if len(re.sub(r"\W", "", filled)) >= SHORTEST:
                    yield Message(name, node.lineno, kind, filled)


def strings() -> set[str]:
    """All text in the package, since a message may be put together anywhere; docstrings are too long to be one."""
    texts = {template(node)[0] for _, node in nodes() if isinstance(node, ast.JoinedStr | ast.Constant)}
    return {text for text in texts if SHORTEST < len(text) < 600}


def is_quoted(quote: str, text: str) -> bool:
    """Whether a quote's parts occur in a text, in order."""
    position = 0
    for part in quote.split(HOLE):
        position = text.find(part.strip(), position)
        if position < 0:
            return False
        position += len(part.strip())
    return True
