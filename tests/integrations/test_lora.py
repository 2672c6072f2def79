"""Adapters that lie in folders."""

import re
from pathlib import Path

import pytest

from paged_cache.errors import InvalidRequestError
from paged_cache.integrations.lora import adapter_folders


def save(*folders):
    """Empty adapters."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def test_adapters_have_the_names_of_their_folders(tmp_path, monkeypatch):
    """All folders with a configuration are found, by any way of writing the path, and nothing else is."""
    save(tmp_path / "sql", tmp_path / "chat v2")
    save(tmp_path / "deep" / "inside")
    (tmp_path / "README.md").write_text("adapters", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    expected = {"chat v2": tmp_path / "chat v2", "sql": tmp_path / "sql"}
    for path in (tmp_path, str(tmp_path), ".", Path(), "deep/.."):
        assert list(adapter_folders(path).items()) == list(expected.items())


def test_linked_adapters(tmp_path):
    """A link to a folder is an adapter of the link's name."""
    save(tmp_path / "store" / "blob")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "sql").symlink_to(tmp_path / "store" / "blob")

    (name,) = adapter_folders(tmp_path / "adapters")
    assert name == "sql"


def test_a_folder_that_is_an_adapter(tmp_path):
    """It has its own name, written as "." or not, and checkpoints inside have theirs."""
    save(tmp_path / "sql")
    assert adapter_folders(tmp_path / "sql") == {"sql": tmp_path / "sql"}
    assert adapter_folders(f"{tmp_path}/sql/.") == {"sql": tmp_path / "sql"}

    save(tmp_path / "sql" / "checkpoint-20")
    assert list(adapter_folders(tmp_path / "sql")) == ["checkpoint-20", "sql"]


def test_two_of_one_name(tmp_path):
    """Neither is taken for the other."""
    save(tmp_path / "sql", tmp_path / "sql" / "sql")
    places = re.escape(f"'sql': {tmp_path / 'sql'} and {tmp_path / 'sql' / 'sql'}")
    with pytest.raises(InvalidRequestError, match=places):
        adapter_folders(tmp_path / "sql")


def test_nothing_to_find(tmp_path):
    """A folder that is not there, a file, and a folder without adapters are named."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty" / "sql").mkdir(parents=True)
    for name in ("missing", "file"):
        with pytest.raises(InvalidRequestError, match=f"{name}' is no folder"):
            adapter_folders(tmp_path / name)
    with pytest.raises(InvalidRequestError, match=r"no adapter_config\.json in '.*empty'"):
        adapter_folders(tmp_path / "empty")
