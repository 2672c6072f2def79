"""What values in messages look like."""

import torch

from paged_cache.wording import shown


def test_values_in_messages():
    """One line, and three dots where something was left out."""
    assert shown("a  b") == "'a b'"
    assert shown(list(range(40)), 20) == "[0, 1, 2, 3, 4, 5..."
    assert len(shown("x" * 500)) == 100
    assert shown(torch.nn.Sequential(torch.nn.ReLU())) == "Sequential( (0): ReLU() )"
