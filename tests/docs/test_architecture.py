"""docs/architecture.md names every module, on the floor that it is on."""

import re

from tests.docs.pages import ROOT
from tests.test_layering import FLOORS

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_floors_are_those_of_the_layering() -> None:
    """The table has each entry of FLOORS on its floor, and nothing else."""
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", PAGE, re.MULTILINE)
    shown = {name.rstrip("/"): int(floor) for floor, names in rows for name in re.findall(r"`([^`]+)`", names)}
    real = {module.removeprefix("paged_cache.") if "." in module else "__init__": f for module, f in FLOORS.items()}

    assert shown == real


def test_modules_of_the_batcher_are_named() -> None:
    """The table of `batching/` has each of its modules."""
    table = PAGE.partition("| module of `batching/` |")[2].partition("\n\n")[0]
    shown = set(re.findall(r"`(\w+)`", table))
    real = {path.stem for path in (ROOT / "paged_cache" / "batching").glob("[a-z]*.py")}

    assert shown == real
