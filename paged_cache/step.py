"""What one forward writes and reads, as tensors: made once per layer group and device and used by all its layers there."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .memory.growth import SKIP, Growth
from .memory.manager import BlockManager
from .memory.sequence import Sequence
from .memory.storage import KVStorage, Lane
from .paged_tensor import PagedTensor, Source
from .row_tensors import LensTensor, TableTensor


class Lengths:
    """How long the rows of a forward are, on one device."""

    cu_seqlens_q = None  # rows are not packed

    def __init__(self, step: "Step", device: torch.device) -> None:
        self._step, self._device = step, device

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        """int32 `[batch]`: stored tokens per row, the new ones included."""
        return self._step.lens.update(self._step.rows, self._device)

    @cached_property
    def pads(self) -> torch.Tensor:
        """int64 `[batch]`: per row the columns of left padding."""
        return torch.tensor(self._step.pads, dtype=torch.int64, device=self._device)


class GroupWrites:
    """What any forward, padded or packed, writes in one layer group on one device.

    Args:
        lane: The layer group and the device.
        step: The forward.
        slots: Of all new tokens in order; `SKIP` for those that are not written.
        table: Makes the block table.

    Attributes:
        window: The group's window, None for all.
        slots: int64 `[num_written]`, where the new tokens go.
        written: int64 `[num_written]`, which of the new tokens these are; None for all in order.
        lengths: The rows' lengths on the device.
        memos: What kernels remember from layer to layer, by the options of their calls.
    """

    def __init__(self, lane: Lane, step: Any, slots: list[int], table: TableTensor) -> None:
        self.group, self.device, self.step = lane.group, lane.device, step
        self.lengths = step.lengths(lane.device)
        self.window = step.storage.layout.windows[lane.group]
        self.memos: defaultdict[Hashable, dict[Any, Any]] = defaultdict(dict)
        self._table = table
        self.written: torch.Tensor | None = None
        if SKIP in slots:
            kept = [i for i, slot in enumerate(slots) if slot != SKIP]
            self.written = torch.tensor(kept, dtype=torch.int64, device=lane.device)
            slots = [slots[i] for i in kept]
        self.slots = torch.tensor(slots, dtype=torch.int64, device=lane.device)

    @cached_property
    def block_table(self) -> torch.Tensor:
        """int32 `[rows, max_blocks]`."""
        return self._table.update(self.step.rows, self.group, self.device)


class GroupStep(GroupWrites):
    """One forward in one layer group on one device.

    Attributes:
        kv_offset: First column (token of the padded rows) that attention can see.
        kv_length: Columns from there to the newest.
    """

    step: "Step"
    lengths: Lengths

    def __init__(self, lane: Lane, step: "Step", slots: list[list[int]], table: TableTensor) -> None:
        flat = [slot for row in slots for slot in [SKIP] * (step.q_len - len(row)) + row]
        super().__init__(lane, step, flat, table)
        self.kv_offset = 0 if self.window is None else max(step.start - self.window + 1, 0)
        self.kv_length = step.start + step.q_len - self.kv_offset

    @cached_property
    def dense_slots(self) -> torch.Tensor:
        """int64 `[batch * kv_length]`: the slot behind each visible column, 0 for padding."""
        size = self.step.storage.block_size
        columns = torch.arange(self.kv_offset, self.kv_offset + self.kv_length, device=self.device)
        positions = (columns - self.lengths.pads[:, None]).clamp_(min=0)
        blocks = self.block_table.long().gather(1, positions // size)
        return (blocks * size + positions % size).clamp_(min=0).flatten()

    @cached_property
    def padding(self) -> torch.Tensor | None:
        """bool `[batch, kv_length, 1, 1]`, True for columns that are padding and hold nothing; None if there are none."""
        if max(self.step.pads) <= self.kv_offset:
            return None
        columns = torch.arange(self.kv_offset, self.kv_offset + self.kv_length, device=self.device)
        return (columns < self.lengths.pads[:, None])[..., None, None]


@dataclass
class StepInputs:
    """What is known of a forward before it runs.

    Attributes:
        batch, q_len: Shape of the new tokens.
        pads: Per row the columns of left padding.
        tokens: Per row the ids of the new tokens, padding left out; None if unknown or not to be shared.
        lazy, is_regular, needs_weights: See `Step`.
    """

    batch: int
    q_len: int
    pads: list[int]
    tokens: list[list[int]] | None = None
    lazy: bool = False
    is_regular: bool = False
    needs_weights: bool = False

    def grow(self, manager: BlockManager, rows: list[Sequence], start: int) -> list[list[list[int]]]:
        """Makes room for the new tokens behind column `start`; returns their slots, `[group][row]`.

        Raises:
            OutOfBlocksError: Too few blocks for all rows; nothing was changed.
        """
        if self.tokens is not None and self.q_len == 1 and all(self.tokens):  # the usual decoding step
            slots = manager.append(rows, [token for (token,) in self.tokens])
            return [[[slot] for slot in group] for group in slots]
        known = self.tokens if self.tokens is not None else [None] * len(rows)
        counts = [max(start + self.q_len - max(pad, start), 0) for pad in self.pads]
        growths = [Growth(row, count, ids) for row, count, ids in zip(rows, counts, known, strict=True)]
        return manager.extend(growths).slots


@dataclass
class Step:
    """One forward over all rows.

    Attributes:
        storage: Where K and V go.
        rows: The sequences, already grown by this step.
        pads: Per row the columns of left padding, which are not stored.
        start: Columns before this step.
        q_len: New columns.
        lazy: Whether attention knows `PagedTensor`; otherwise layers return dense tensors at once.
        is_regular: Whether the mask hides nothing but left padding, so that a kernel needs no mask.
        is_contiguous: Whether dense tensors have to be contiguous, at the cost of one more copy.
        known_pads: `pads` before this step.
        lens: Makes the rows' lengths.
        needs_weights: Whether the caller asked for attention probabilities, which no kernel gives.
        groups: One for each lane of the storage.
    """

    storage: KVStorage
    rows: list[Sequence]
    pads: list[int]
    start: int
    q_len: int
    lazy: bool = False
    is_regular: bool = False
    needs_weights: bool = False
    is_contiguous: bool = False
    known_pads: list[int] = field(default_factory=list)
    lens: LensTensor = field(default_factory=LensTensor)
    groups: tuple[GroupStep, ...] = ()
    num_updates: int = 0
    max_q_len = None  # rows are not packed
    _lengths: dict[torch.device, Lengths] = field(default_factory=dict)

    def lengths(self, device: torch.device) -> Lengths:
        """The rows' lengths on a device, in common for all groups."""
        if device not in self._lengths:
            self._lengths[device] = Lengths(self, device)
        return self._lengths[device]

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's new K and V, `[batch, heads, q_len, dim]`, and returns all that its attention can see.

        No gradient flows into the pool: tokens of earlier forwards are constants.
        """
        self.num_updates += 1
        group = self.groups[self.storage.lane_of[layer]]
        flat_keys, flat_values = _as_tokens(keys), _as_tokens(values)
        if group.written is not None:
            flat_keys, flat_values = flat_keys[group.written], flat_values[group.written]
        self.storage.write(layer, group.slots, flat_keys, flat_values)
        if self.start == 0:
            return keys, values
        view = PagedView(layer, group)
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            past = group.kv_length - self.q_len  # the new tokens keep their graph
            return tuple(torch.cat([x[:, :, :past], new], 2) for x, new in zip(view.dense, (keys, values), strict=True))  # type: ignore[return-value]
        if keys.dtype != values.dtype or keys.dtype != self.storage.dtype:  # under autocast
            return tuple(x.to(new.dtype) for x, new in zip(view.dense, (keys, values), strict=True))  # type: ignore[return-value]
        if not self.lazy:
            return view.dense
        return view.lazy(Keys(view), keys), view.lazy(Values(view), values)


def _as_tokens(new: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, q_len, dim]` to `[batch * q_len, heads, dim]`, without a graph."""
    if new.requires_grad:
        new = new.detach()
    return new[:, :, 0] if new.shape[2] == 1 else new.transpose(1, 2).flatten(0, 1)


@dataclass(eq=False)
class PagedView:
    """One layer's blocks as one forward sees them: what a kernel needs, and how to do without one."""

    layer: int
    group: GroupStep

    @property
    def step(self) -> Step:
        """The forward."""
        return self.group.step

    def lazy(self, source: Source, new: torch.Tensor) -> PagedTensor:
        """Stands for one half of `dense`; `new` is that half of the new tokens."""
        (batch, heads, _, dim), length = new.shape, self.group.kv_length
        strides = (length * heads * dim, dim, heads * dim, 1)  # as a gather of whole tokens lays them out
        return PagedTensor(source, (batch, heads, length, dim), new.dtype, new.device, strides)

    @cached_property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[batch, heads, kv_length, dim]`, gathered; zeros where a column is padding."""
        group, step = self.group, self.step
        shape = (len(step.rows), group.kv_length)
        keys, values = (x.unflatten(0, shape) for x in step.storage.gather(self.layer, group.dense_slots))
        if group.padding is not None:
            keys, values = keys.masked_fill_(group.padding, 0), values.masked_fill_(group.padding, 0)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return (keys.contiguous(), values.contiguous()) if step.is_contiguous else (keys, values)


@dataclass(eq=False)
class Keys:
    """Source of a `PagedTensor` of keys."""

    view: PagedView

    def dense(self) -> torch.Tensor:
        """The keys, gathered."""
        return self.view.dense[0]


@dataclass(eq=False)
class Values:
    """Source of a `PagedTensor` of values."""

    view: PagedView

    def dense(self) -> torch.Tensor:
        """The values, gathered."""
        return self.view.dense[1]
