"""What layers keep besides K and V, taken apart by rows and put together again."""

from types import SimpleNamespace

import torch

from paged_cache.batching.row_states import join, split


def layer(num_rows, seed=0, **attributes):
    """A cache layer with states of all the kinds that transformers keeps, and what ties it to its cache."""
    generator = torch.Generator().manual_seed(seed)

    def state(*shape):
        return torch.randn(num_rows, *shape, generator=generator)

    kept = {
        "conv_states": {0: state(4, 3), 1: state(2)},
        "recurrent_states": [state(2, 5), None],
        "pair": (state(3), state(1)),
        "is_initialized": True,
        "scale": torch.tensor(2.0),
        "nothing": None,
    }
    return SimpleNamespace(_state=object(), layer_idx=7, **{**kept, **attributes})


def flat(value):
    """All tensors in a nest, in order."""
    if isinstance(value, SimpleNamespace):
        value = {name: item for name, item in vars(value).items() if name not in ("_state", "layer_idx")}
    if isinstance(value, dict):
        return [x for key in value for x in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in flat(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def assert_equal(found, expected):
    """The same tensors, of the same shapes."""
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))


def test_there_and_back():
    """Rows that are taken apart and put together are what they were, for any number of rows and layers."""
    for num_rows in (1, 2, 4):
        layers = [layer(num_rows, seed) for seed in range(3)]
        rows = split(layers, num_rows)
        assert len(rows) == num_rows
        assert_equal(join(rows), layers)


def test_rows_go_elsewhere():
    """A row taken from one batch and put into another has its own states there, in the order that is asked for."""
    one, other = split([layer(3, 1)], 3), split([layer(2, 2)], 2)

    (found,) = join([other[1], one[2], one[0]])

    want = torch.stack([layer(2, 2).conv_states[0][1], layer(3, 1).conv_states[0][2], layer(3, 1).conv_states[0][0]])
    assert torch.equal(found.conv_states[0], want)
    assert found.recurrent_states[0].shape == (3, 2, 5)
    assert found.recurrent_states[1] is None
    assert isinstance(found.pair, tuple)


def test_what_ties_a_layer_to_its_cache_stays():
    """The layer's number and its cache are no part of a row."""
    (row,) = split([layer(1)], 1)

    assert "_state" not in row[0]
    assert "layer_idx" not in row[0]
    assert row[0]["is_initialized"] is True


def test_values_without_rows_are_shared():
    """Scalars and flags are the same for all rows."""
    rows = split([layer(2)], 2)

    (found,) = join(rows)
    assert found.scale.shape == ()
    assert found.nothing is None
    assert found.is_initialized is True


def test_no_rows_no_layers():
    """Nothing put together is nothing."""
    assert join([]) == []
