"""One forward over rows of different lengths, laid side by side without padding: `[1, num_tokens]`."""

from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .compat import not_traced
from .errors import UnsupportedModelError
from .memory.sequence import Sequence
from .memory.storage import Lane
from .model_spec import cache_layers
from .pool import BlockPool
from .row_tensors import TableTensor
from .step import GroupWrites, Keys, PagedView, Values


class PackedStep:
    """What all layers of one packed forward write and read.

    Args:
        cache: Whose forward it is.
        rows: The sequences, already grown by this step.
        num_new: Per row how many of its tokens are new.
        slots: Per layer group the slot of each new token, row after row; `SKIP` where a block holds it already.

    Attributes:
        q_len: New tokens of all rows.
        max_q_len: Most new tokens of a row.
        ends: Where each row's new tokens begin, and the end of the last.
        lens: Tokens per row, the new ones included.
    """

    is_regular, needs_weights = True, False

    def __init__(self, cache: "PackedCache", rows: list[Sequence], num_new: list[int], slots: list[list[int]]) -> None:
        pool = cache.pool
        self.storage, self.rows = pool.storage, rows
        ends, end = [0], 0
        for count in num_new:
            end += count
            ends.append(end)
        self.q_len, self.max_q_len, self.pads = end, max(num_new), (0,)
        self.ends, self.lens = ends, [row.num_tokens for row in rows]
        self._lengths: dict[torch.device, PackedLengths] = {}
        self.groups = [
            PackedGroup(lane, self, slots[lane.group], cache.tables[lane.group]) for lane in pool.storage.lanes
        ]

    def lengths(self, device: torch.device) -> "PackedLengths":
        """The rows' lengths on a device, in common for all groups."""
        if device not in self._lengths:
            self._lengths[device] = PackedLengths(self, device)
        return self._lengths[device]


class PackedLengths:
    """How long the rows of a packed forward are, on one device.

    Attributes:
        cu_seqlens_q: int32 `[rows + 1]`, where each row's new tokens begin, and the end of the last.
        seq_lens: int32 `[rows]`, tokens per row, the new ones included.
    """

    def __init__(self, step: PackedStep, device: torch.device) -> None:
        both = torch.tensor(step.ends + step.lens, dtype=torch.int32, device=device)
        self.cu_seqlens_q, self.seq_lens = both.split([len(step.ends), len(step.lens)])


class PackedGroup(GroupWrites):
    """One packed forward in one layer group on one device; see `GroupStep`."""

    kv_offset = 0

    def __init__(self, lane: Lane, step: PackedStep, slots: list[int], table: TableTensor) -> None:
        super().__init__(lane, step, slots, table)
        self.kv_length = step.q_len


class PackedView(PagedView):
    """One layer's blocks as a packed forward sees them. There is no dense form: rows have nothing in common."""

    @cached_property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing but a kernel can read packed rows.

        Raises:
            UnsupportedModelError: Always.
        """
        raise UnsupportedModelError(
            f"layer {self.layer} does not leave its attention to a kernel, so that rows cannot be packed."
        )


class PackedLayer(CacheLayerMixin):
    """K and V of one layer in packed forwards."""

    is_compileable = False

    def __init__(self, cache: "PackedCache", index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self._index = cache, index
        window = cache.pool.spec.layers[index].window
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Compares the layer's first K and V with the pool."""
        self._cache.pool.check_layer(self._index, key_states, value_states)
        self.is_initialized = True

    @not_traced
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new K and V, `[1, heads, num_tokens, dim]`, and returns what carries the way to the blocks."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self._cache.step
        if step is None or key_states.shape[0] != 1 or key_states.shape[2] != step.q_len:
            raise UnsupportedModelError(
                f"layer {self._index} gives keys {tuple(key_states.shape)} outside a packed step of as many tokens."
            )
        self._cache.num_updates += 1
        group = step.groups[step.storage.lane_of[self._index]]
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        if group.written is not None:
            keys, values = keys[group.written], values[group.written]
        step.storage.write(self._index, group.slots, keys, values)
        view = PackedView(self._index, group)  # type: ignore[arg-type]
        return view.lazy(Keys(view), key_states), view.lazy(Values(view), value_states)

    def get_seq_length(self) -> int:
        """Always 0: positions are given with the tokens."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a prompt of so many tokens; which of them a row sees is the kernel's to know."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class PackedCache(Cache):
    """The cache that a model sees in packed forwards; rows live outside of it.

    Attributes:
        step: The forward under way.
        tables: Block tables per layer group, kept from step to step.
        num_updates: How many layers wrote in this step.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.step: PackedStep | None = None
        self.tables = [TableTensor() for _ in pool.storage.layout.windows]
        self.num_updates = 0
        templates = enumerate(cache_layers(pool.spec.config))
        super().__init__(layers=[PackedLayer(self, i) if i in pool.spec.layers else layer for i, layer in templates])

    def begin(self, rows: list[Sequence], num_new: list[int], slots: list[list[int]]) -> None:
        """Opens a step; see `PackedStep`."""
        self.step, self.num_updates = PackedStep(self, rows, num_new, slots), 0

    def end(self) -> None:
        """Closes the step."""
        self.step = None
