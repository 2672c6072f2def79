"""Imports go down only. The floors are those of docs/architecture.md; the tables here are the executable version."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package stands for all of its modules; the longest name that fits wins. A new module gets a line here.
FLOORS = {
    "paged_cache.errors": 0,
    "paged_cache.compat": 0,
    "paged_cache.assets": 0,
    "paged_cache.optional": 0,
    "paged_cache.machine_memory": 0,
    "paged_cache.wording": 0,
    "paged_cache.memory": 1,
    "paged_cache.kernels": 1,
    "paged_cache.paged_tensor": 1,
    "paged_cache.adapters": 1,
    "paged_cache.attention": 2,
    "paged_cache.cache": 2,
    "paged_cache.devices": 2,
    "paged_cache.forward": 2,
    "paged_cache.implementation": 2,
    "paged_cache.layers": 2,
    "paged_cache.fingerprint": 2,
    "paged_cache.masks": 2,
    "paged_cache.model_spec": 2,
    "paged_cache.packed": 2,
    "paged_cache.patching": 2,
    "paged_cache.pool": 2,
    "paged_cache.prepacking": 2,
    "paged_cache.pool_stats": 1,
    "paged_cache.prefix_checks": 2,
    "paged_cache.prefix_file": 2,
    "paged_cache.prompt": 2,
    "paged_cache.reuse": 2,
    "paged_cache.row_tensors": 2,
    "paged_cache.saved_prefixes": 2,
    "paged_cache.bits": 1,
    "paged_cache.sizes": 1,
    "paged_cache.state": 2,
    "paged_cache.step": 2,
    "paged_cache.weights": 2,
    "paged_cache.batching": 3,
    "paged_cache.pool_map": 3,
    "paged_cache": 4,  # the facade, __init__.py: public names, nothing else
    "paged_cache.__main__": 6,
    "paged_cache.bench": 5,
    "paged_cache.cli": 6,
    "paged_cache.compare": 5,
    "paged_cache.demo": 5,
    "paged_cache.demo_report": 5,
    "paged_cache.kv_memory": 5,
    "paged_cache.loading": 5,
    "paged_cache.picture": 5,
    "paged_cache.planning": 5,
    "paged_cache.integrations": 5,
    "paged_cache.block_marks": 5,
    "paged_cache.observability": 5,
}

# Neighbours on one floor that must not know each other, in either direction.
STRANGERS = [
    ("paged_cache.cache", "paged_cache.attention"),
    ("paged_cache.integrations", "paged_cache.cli"),
    ("paged_cache.integrations", "paged_cache.demo"),
]

# The left one does not know the right one, which builds on it: storage writes through kernels.
BLIND = [("paged_cache.kernels", "paged_cache.memory")]

# All that integrations and examples may import of ours. Benchmarks also measure parts, such as one kernel.
PUBLIC = [
    "paged_cache",
    "paged_cache.assets",
    "paged_cache.errors",
    "paged_cache.integrations",
    "paged_cache.observability",
]

# Bookkeeping: importing one of these brings in no HEAVY library, directly or through our own modules.
SCHEDULING = [
    f"paged_cache.batching.{name}"
    for name in (
        "adapter_slots", "cost_model", "estimates", "forecast", "plan", "policy", "predictor", "request", "room", "scheduler", "waiting"
    )
]  # fmt: skip
BOOKKEEPING = ["paged_cache.errors", "paged_cache.memory", *SCHEDULING]
# A module of these that needs tensors is listed here; everything else in there stays plain.
NOT_BOOKKEEPING = [
    "paged_cache.memory.block_content",
    "paged_cache.memory.pool",
    "paged_cache.memory.storage",
    "paged_cache.memory.huge_pages",
    "paged_cache.memory.host_storage",
]
HEAVY = ["numba", "numpy", "peft", "torch", "transformers", "triton"]

# Who may name a library at all. Whatever is optional stays where it is used.
OWNERS = {
    "transformers": [
        "paged_cache.compat",
        *(name for name, floor in FLOORS.items() if floor in (2, 3)),
        "paged_cache.bench",
        "paged_cache.compare",
        "paged_cache.demo",
        "paged_cache.kv_memory",
        "paged_cache.loading",
        "paged_cache.planning",
        "paged_cache.integrations",
    ],
    "triton": ["paged_cache.kernels"],
    "numba": ["paged_cache.kernels"],
    "peft": ["paged_cache.adapters.folders", "paged_cache.integrations"],
    "accelerate": [],
    "prometheus_client": ["paged_cache.observability"],
    "matplotlib": ["paged_cache.bench", "paged_cache.compare", "paged_cache.picture"],
    "rich": [
        "paged_cache.bench.tables",
        "paged_cache.cli",
        "paged_cache.compare.report",
        "paged_cache.demo_report",
        "paged_cache.picture",
    ],
    "typer": ["paged_cache.cli"],
}


def within(module: str, names: list[str]) -> bool:
    """Whether `module` is one of `names` or lies inside one; the facade stands for itself only."""
    return any(module == name or (name != "paged_cache" and module.startswith(name + ".")) for name in names)


def place(module: str) -> str | None:
    """The entry of FLOORS that `module` belongs to."""
    return max((name for name in FLOORS if within(module, [name])), key=len, default=None)


def floor(module: str) -> int:
    """The floor of `module`; the ground for one that is not in FLOORS, which has a test of its own."""
    return FLOORS.get(place(module) or "", 0)


def module_name(path: Path) -> str:
    """`integrations/lora.py` -> `paged_cache.integrations.lora`, `paged_cache/__init__.py` -> `paged_cache`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "paged_cache" else ("paged_cache", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Every module of ours and its file."""
    files = [path for path in (ROOT / "paged_cache").rglob("*.py") if "integrations" not in path.parts]
    return {module_name(path): path for path in sorted([*files, *(ROOT / "integrations").rglob("*.py")])}


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, wherever it stands: late imports and those for types count as well."""
    package = module_name(path.with_name("__init__.py")).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def imports(path: Path) -> set[str]:
    """The modules a file imports; `from paged_cache import errors` is an import of `paged_cache.errors`."""
    return {full if (full := f"{module}.{name}") in sources() else module for module, name in imported_names(path)}


@cache
def graph() -> dict[str, set[str]]:
    """Module -> what it imports, ours and others'."""
    return {module: imports(path) for module, path in sources().items()}


def ours(names: set[str]) -> set[str]:
    """Those of `names` that are in this package."""
    return {name for name in names if name.partition(".")[0] == "paged_cache"}


def reachable(module: str) -> set[str]:
    """Everything that importing `module` imports: itself, our modules behind it, and their libraries."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph().get(name, ())
    return found


def test_every_module_has_a_floor() -> None:
    """A new module is put on a floor before it is used."""
    homeless = [module for module in sources() if place(module) is None]

    assert not homeless, f"add to FLOORS in {Path(__file__).name}: {homeless}"


def test_imports_go_down() -> None:
    """No module imports one of a higher floor."""
    upward = [
        f"{module} (floor {floor(module)}) imports {name} (floor {floor(name)})"
        for module, names in graph().items()
        for name in ours(names)
        if floor(name) > floor(module)
    ]

    assert not upward


@pytest.mark.parametrize(("left", "right"), STRANGERS)
def test_strangers_stay_strangers(left: str, right: str) -> None:
    """The cache knows nothing of attention, attention nothing of the cache, and so on."""
    sideways = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for name in names
        if (within(module, [left]) and within(name, [right])) or (within(module, [right]) and within(name, [left]))
    ]

    assert not sideways


@pytest.mark.parametrize(("module", "unknown"), BLIND)
def test_some_know_their_neighbours_in_one_direction_only(module: str, unknown: str) -> None:
    """Kernels know tensors and no pool."""
    known = [
        f"{name} imports {other}"
        for name, names in graph().items()
        for other in names
        if within(name, [module]) and within(other, [unknown])
    ]

    assert not known


def test_no_cycles() -> None:
    """No two modules need each other, not even through a late import."""
    cycles = [module for module, names in graph().items() if any(module in reachable(name) for name in ours(names))]

    assert not cycles


def test_bookkeeping_is_plain_python() -> None:
    """Tables, prefix index and scheduler can be tested by the million operations: nothing heavy behind them."""
    plain = [module for module in sources() if within(module, BOOKKEEPING) and not within(module, NOT_BOOKKEEPING)]
    heavy = {module: [name for name in reachable(module) if within(name, HEAVY)] for module in plain}

    assert len(plain) > 1
    assert not {module: names for module, names in heavy.items() if names}


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_stay_with_their_owners(library: str) -> None:
    """Each library is named only in the modules that are about it."""
    others = [
        module
        for module, names in graph().items()
        if not within(module, OWNERS[library]) and any(within(name, [library]) for name in names)
    ]

    assert not others


@pytest.mark.parametrize("folder", ["integrations", "examples"])
def test_callers_use_public_names(folder: str) -> None:
    """What is built on the package uses what any user could."""
    private = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in ours(imports(path))
        if not within(name, PUBLIC)
    ]

    assert not private
