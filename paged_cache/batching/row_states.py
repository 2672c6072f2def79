"""What cache layers keep besides K and V (states of linear attention, say), taken apart by rows and put together again."""

from types import SimpleNamespace
from typing import Any, TypeAlias

import torch

from ..layers import PLUMBING

RowStates: TypeAlias = list[dict[str, Any]]
"""One row's part of each layer's attributes."""


def split(layers: list[Any], num_rows: int) -> list[RowStates]:
    """The attributes of layers that hold `num_rows` rows, row by row. Tensors are views: change them no more."""
    kept = [{name: value for name, value in vars(layer).items() if name not in PLUMBING} for layer in layers]
    if num_rows == 1:
        return [kept]
    return [[_part(attributes, i, num_rows) for attributes in kept] for i in range(num_rows)]


def join(rows: list[RowStates]) -> list[SimpleNamespace]:
    """The attributes of layers that hold these rows; none for no rows."""
    if len(rows) == 1:
        return [SimpleNamespace(**attributes) for attributes in rows[0]]
    return [SimpleNamespace(**_together(list(parts))) for parts in zip(*rows, strict=True)]


def _part(value: Any, i: int, num_rows: int) -> Any:
    if isinstance(value, dict):
        return {key: _part(item, i, num_rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_part(item, i, num_rows) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == num_rows:
        return value[i : i + 1]
    return value


def _together(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {key: _together([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_together(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, torch.Tensor) and first.dim():
        return torch.cat(parts)
    return first
