"""The API reference has every public name."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PUBLIC = [
    "paged_cache",
    "paged_cache.assets",
    "paged_cache.errors",
    "paged_cache.integrations",
    "paged_cache.observability",
    "paged_cache.planning",
]
DIRECTIVE = re.compile(r"^\.\. (py:)?(module|currentmodule|auto\w+):: ([\w.]+)(?:\n +(:[\w-]+:))?", re.MULTILINE)


def listed(page: Path) -> set[str]:
    """Full names that a page of the reference documents."""
    names, module = set(), ""
    for _, directive, name, option in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
        is_whole = option == ":members:"
        if directive in ("module", "currentmodule"):
            module = name
        elif directive == "automodule":
            module = name
            names |= {f"{name}.{member}" for member in own_names(name)} if is_whole else set()
        else:
            names.add(name if name.startswith("paged_cache.") else f"{module}.{name}")
    return names


def own_names(module: str) -> list[str]:
    """Public names of a module: `__all__`, or the classes and functions that are defined in it."""
    members = vars(importlib.import_module(module))
    made_here = [name for name, value in members.items() if getattr(value, "__module__", None) == module]
    return list(members.get("__all__", [name for name in made_here if not name.startswith("_")]))


def known() -> set[str]:
    """Every documented name, by its object's place too: `paged_cache.errors.X` is `paged_cache.X`."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return set().union(*map(listed, pages))


@pytest.mark.parametrize("module", [name for name in PUBLIC if importlib.util.find_spec(name)])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """What `import *` gives has an entry, here or under the module that defines it."""
    namespace = importlib.import_module(module)
    names = own_names(module)
    entries = known()
    homes = {name: getattr(getattr(namespace, name), "__module__", module) for name in names}
    missing = [
        name for name in names if not {f"{module}.{name}", f"{homes[name]}.{name}", f"paged_cache.{name}"} & entries
    ]

    assert names
    assert not missing, f"add to docs/api: {missing}"


def test_documented_names_exist() -> None:
    """An entry without an object would be an empty line on the site."""
    gone = []
    for name in known():
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(module), attribute):
            gone.append(name)

    assert not gone


@pytest.mark.parametrize("module", [name for name in PUBLIC if importlib.util.find_spec(name)])
def test_what_is_in_the_reference_is_described(module: str) -> None:
    """Each public class and function has a docstring of its own, and so have their public methods."""
    namespace = importlib.import_module(module)
    silent = []
    for name in own_names(module):
        value = getattr(namespace, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            methods = vars(value).items() if inspect.isclass(value) else ()
            parts = {name: value} | {f"{name}.{m}": f for m, f in methods if inspect.isfunction(f) and m[0] != "_"}
            silent += [part for part, thing in parts.items() if not inspect.getdoc(thing)]

    assert not silent
