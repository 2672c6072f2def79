"""Small functions, small files, tests that say what they test: style, measured."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MEDIAN_FUNCTION = 10
LONGEST_FUNCTION = 60
LONGEST_FILE = 300
LONGEST_KERNEL_FILE = 400  # a kernel, its launcher and the public function are read together

# Kernels are one piece by nature. A decorator counts with or without its module and arguments: @numba.njit(cache=True).
COMPILERS = {"jit", "njit", "cfunc", "autotune", "heuristics"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[Path]:
    """The package, integrations through their folder at the root."""
    package = [path for path in (ROOT / "paged_cache").rglob("*.py") if "integrations" not in path.parts]
    return sorted([*package, *(ROOT / "integrations").rglob("*.py")])


def is_compiled(function: Function) -> bool:
    """Whether triton or numba compiles this function."""
    calls = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return any(getattr(node, "attr", getattr(node, "id", None)) in COMPILERS for node in calls)


def functions_in(path: Path) -> list[Function]:
    """Every function and method in a file, nested ones included."""
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, Function)]


def num_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def functions() -> Iterator[tuple[str, int]]:
    """Place and size of every function that is not a compiled kernel."""
    for path in files():
        for node in functions_in(path):
            if not is_compiled(node):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", num_lines(node)


def test_the_usual_function_is_small() -> None:
    """Half of all functions have at most ten lines."""
    assert median(lines for _, lines in functions()) <= MEDIAN_FUNCTION


def test_no_function_is_long() -> None:
    """Every function can be seen at once."""
    assert not {place: lines for place, lines in functions() if lines > LONGEST_FUNCTION}


def test_no_file_is_long() -> None:
    """Every file has one subject."""
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files()}

    longest = {name: LONGEST_KERNEL_FILE if "/kernels/" in name else LONGEST_FILE for name in sizes}
    assert not {name: lines for name, lines in sizes.items() if lines > longest[name]}


def test_every_test_says_what_must_hold() -> None:
    """Each test function has a sentence."""
    silent = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for function in functions_in(path)
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]

    assert not silent
