"""What is installed, what importing it costs, and what it leaves alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import paged_cache

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ["accelerate", "matplotlib", "numba", "peft", "prometheus_client", "rich", "triton", "typer"]

# Fails with both states if the statements between the two calls change anything that others share.
SNAPSHOT = """
import torch, transformers
from transformers import masking_utils, modeling_utils, pipelines

def snapshot():
    registries = modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    classes = transformers.Cache, transformers.DynamicCache, transformers.GenerationMixin, transformers.PreTrainedModel
    return (
        [dict(registry) for registry in registries],
        [dict(vars(part)) for part in (*classes, torch.Tensor, torch.nn.Module)],
        set(pipelines.PIPELINE_REGISTRY.get_supported_tasks()),
        dict(torch.nn.modules.module._global_forward_pre_hooks),
    )

before = snapshot()
import paged_cache
import paged_cache.integrations
assert snapshot() == before
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in an interpreter of its own, from the checkout."""
    return start("-c", code)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start an interpreter of its own, from the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def blocked(names: list[str]) -> str:
    """Python code after which importing any of `names` fails as if it were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


def folders_with_code() -> set[str]:
    """Every folder of the package that holds Python files, as a dotted name."""
    package = {path.parent for path in (ROOT / "paged_cache").rglob("*.py") if "integrations" not in path.parts}
    names = {str(path.relative_to(ROOT)).replace("/", ".") for path in package}
    integrations = {path.parent.relative_to(ROOT) for path in (ROOT / "integrations").rglob("*.py")}
    return names | {"paged_cache." + str(path).replace("/", ".") for path in integrations}


def setuptools_packages() -> set[str]:
    """The list in pyproject.toml. By a regular expression: tomllib came with Python 3.11."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"([^"]+)"', listed[1]))


def exposed(module: ModuleType) -> list[str]:
    """The names a user sees: no modules, nothing that begins with an underscore except the version."""
    return sorted(
        name
        for name, value in vars(module).items()
        if name == "__version__" or not (name.startswith("_") or isinstance(value, ModuleType))
    )


def test_package_list_is_complete() -> None:
    """A folder that is not listed would be missing from the wheel without a word."""
    assert folders_with_code() == setuptools_packages()


def test_packages_are_packages() -> None:
    """Each has an __init__.py, so that the checkout and the wheel behave the same."""
    without = [name for name in setuptools_packages() if not (ROOT / name.replace(".", "/") / "__init__.py").is_file()]

    assert not without


def test_package_is_typed() -> None:
    """Type checkers of other projects read our annotations only with this file."""
    assert (ROOT / "paged_cache" / "py.typed").is_file()


def test_integrations_link() -> None:
    """The link that makes integrations/ importable without an installation is relative."""
    link = ROOT / "paged_cache" / "integrations"

    assert link.is_symlink()
    assert str(link.readlink()) == "../integrations"


def test_all_is_what_is_exposed() -> None:
    """`__all__` is sorted and has every public name, and no other; those that were not used yet are listed, too."""
    assert set(paged_cache.__all__) <= set(dir(paged_cache))
    for name in paged_cache.__all__:
        assert getattr(paged_cache, name) is not None
    assert exposed(paged_cache) == paged_cache.__all__


def test_names_that_are_not_there() -> None:
    """They are refused as by any module."""
    with pytest.raises(AttributeError, match="has no attribute 'PagedCach'"):
        _ = paged_cache.PagedCach


def test_the_command_line_does_not_wait_for_torch() -> None:
    """Nor does `import paged_cache`: what takes seconds is imported when it is used."""
    code = "import sys, paged_cache, paged_cache.cli; print({'torch', 'transformers', 'matplotlib'} & {*sys.modules})"
    result = run(code)

    assert result.stdout.strip() == "set()", result.stderr


def test_version() -> None:
    """The package and pyproject.toml give the same version."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    assert re.search(r'^version = "(.+)"', text, re.MULTILINE)[1] == paged_cache.__version__


def test_changelog_knows_the_version() -> None:
    """The version is in the changelog before it is released."""
    assert f"## [{paged_cache.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_imports_without_optional_libraries() -> None:
    """`import paged_cache` and the integrations need none of the extras."""
    result = run(blocked(OPTIONAL) + "import paged_cache, paged_cache.integrations")

    assert result.returncode == 0, result.stderr


def test_import_brings_in_no_optional_library() -> None:
    """Beyond those that torch and transformers load on their own."""
    loaded = "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    libraries = "import sys, torch\nfrom transformers import Cache, GenerationMixin, PreTrainedModel"
    result = run(f"{libraries}\n{loaded}\nimport paged_cache\n{loaded}")
    alone, together = (set(ast.literal_eval(line)) for line in result.stdout.splitlines())

    assert "paged_cache" in together - alone
    assert not (together - alone).intersection(OPTIONAL)


def test_import_changes_nothing() -> None:
    """Importing registers and replaces nothing in transformers and torch; only `patch` does."""
    result = run(SNAPSHOT)

    assert result.returncode == 0, result.stderr


def test_command_without_its_extra() -> None:
    """The paged-cache command says in one line what to install."""
    result = run(blocked(["rich", "typer"]) + "from paged_cache.__main__ import main; main()")

    assert result.returncode == 1
    assert "pip install '.[cli]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_command_offers_help() -> None:
    """`python -m paged_cache --help` lists the commands, also without the command on the path."""
    result = start("-m", "paged_cache", "--help")

    assert result.returncode == 0, result.stderr
    assert "paged" in result.stdout
    assert "demo" in result.stdout
