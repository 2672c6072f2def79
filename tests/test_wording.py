"""What values in messages look like."""

import torch

from paged_cache.wording import format_bytes, shown


def test_values_in_messages():
    """One line, and three dots where something was left out."""
    assert shown("a  b") == "'a b'"
    assert shown(list(range(40)), 20) == "[0, 1, 2, 3, 4, 5..."
    assert len(shown("x" * 500)) == 100
    assert shown(torch.nn.Sequential(torch.nn.ReLU())) == "Sequential( (0): ReLU() )"


def test_bytes_in_words():
    """Four digits that count, or as many decimals as a table wants; bytes themselves are whole."""
    assert [format_bytes(n) for n in (0, 524288, 1210000, 2**50)] == ["0 B", "512 KiB", "1.154 MiB", "1024 TiB"]
    assert [format_bytes(n, 1) for n in (0, 3 * 2**20, 1210000)] == ["0 B", "3.0 MiB", "1.2 MiB"]
