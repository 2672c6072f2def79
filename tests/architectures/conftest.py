"""The order of the sweep: last of all tests, architecture by architecture."""

from pathlib import Path

import pytest

SWEEP = Path(__file__).with_name("test_sweep.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one architecture follow each other, to share its model and what it generates.

    They come last, because many small tests are what two workers can divide evenly.
    """
    items.sort(key=lambda item: item.callspec.params["name"] if item.path == SWEEP else "")
