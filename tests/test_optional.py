"""Optional libraries: whoever needs one that is missing learns what to install."""

import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from paged_cache import BlockPool
from paged_cache.observability import PrometheusMetrics, save_pool_map
from paged_cache.optional import _EXTRAS, not_installed, require

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pool():
    """Of a tiny model."""
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    return BlockPool.for_model(model, num_blocks=4)


@pytest.mark.parametrize("library", _EXTRAS)
def test_the_extra_has_the_library(library):
    """The extra that the message names installs what is missing, or what brings it along."""
    extra = _EXTRAS[library]
    line = re.search(rf"^{extra} = (.*)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)

    assert f"pip install '.[{extra}]'" in not_installed(library)
    assert line
    assert f'"{library.replace("_", "-")}>' in line[1]


@pytest.mark.parametrize(("suffix", "library"), [("png", "rich"), ("txt", "rich"), ("png", "matplotlib")])
def test_maps_name_what_they_need(pool, tmp_path, monkeypatch, suffix, library):
    """A picture of a pool without the library: the error says what to install, and no file is begun."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"^{library} is not installed: pip install {library}, or") as error:
        save_pool_map(pool, tmp_path / f"pool.{suffix}")

    assert error.value.name == library
    assert not list(tmp_path.iterdir())


def test_metrics_name_what_they_need(pool, monkeypatch):
    """Prometheus metrics without its client: the error says what to install."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"^prometheus_client is not installed: .*'\.\[metrics\]'$"):
        PrometheusMetrics(pool=pool)


def test_what_a_library_lacks_itself_is_not_hidden(tmp_path, monkeypatch):
    """A library that is there and cannot be imported tells its own story."""
    (tmp_path / "rich.py").write_text("import no_such_library\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rich", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        require("rich")
