"""The rows of one cache and the forward that is under way."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from .adapters.exclusive import lock_of
from .compat import logger, peft_layer_classes
from .errors import InvalidRequestError, PagedCacheError
from .memory.sequence import Sequence
from .pool import BlockPool
from .row_tensors import LensTensor, TableTensor
from .step import GroupStep, PagedView, Step, StepInputs

WITH_CROSS_ATTENTION = (
    "cross attention needs a cache of its own: EncoderDecoderCache(PagedCache(pool), DynamicCache())."
)
"""What an encoder-decoder takes as `past_key_values`."""


@lru_cache(maxsize=1)
def _hint_unpatched() -> None:
    logger.info(
        "PagedCache runs on a model that is not patched: results are the same, but each step gathers all K and V and no "
        "prefix is reused. paged_cache.patch(model) lets attention read blocks in place."
    )


class PagedState:
    """Rows, their blocks, and how far each layer got; shared by a cache and its layers.

    A forward is a step: it opens with the first token that a layer writes, or before the model runs when the model is
    patched, and closes when the forward returned. What a step did is taken back if the forward did not return.

    Attributes:
        length: Columns (tokens of the padded rows) of all closed steps and of the open one.
        root_keys: Per row what besides the tokens its K and V depend on; None while nothing is shared.
        keep_past: Blocks behind windows stay until the next crop.
        light_key: What of `root_keys` may change between two tokens, as it was at the first.
        is_patched: The model tells its forwards in advance.
        can_announce: Its inputs have the rows and columns that its layers give (not so with codebooks, say).
        is_released: The cache gave everything back for good.
    """

    def __init__(self, pool: BlockPool, cache_salt: Hashable = None) -> None:
        self.pool, self.cache_salt = pool, cache_salt
        self.rows: list[Sequence] | None = None
        self.pads: list[int] = []
        self.length = 0
        self.layer_lengths: dict[int, int] = dict.fromkeys(pool.spec.layers, 0)
        self.root_keys: list[Hashable | None] | None = None
        self.keep_past = False
        self.is_released = False
        self.open: Step | None = None
        self.light_key: Hashable = None
        self.is_patched = False
        self.can_announce = True
        self._is_hooked = False
        self._turn: Any = None
        self._tables = [TableTensor() for _ in pool.storage.layout.windows]
        self._lens = LensTensor()

    def __del__(self) -> None:
        if self.rows:
            self.pool.manager.abandon(self.rows)

    @contextmanager
    def holding(self, model: torch.nn.Module) -> Iterator[None]:
        """From here until `let_go` no other thread computes with other adapters of the model."""
        if peft_layer_classes():
            turn = lock_of(model)
            turn.acquire()
            self._turn = turn
        try:
            yield
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """See `holding`; once is enough."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.release()

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V of a layer that the next token can see, gathered: `[batch, heads, length, dim]`."""
        if not self.rows or not self.layer_lengths[layer]:
            return None
        storage = self.pool.storage
        lane = storage.lanes[storage.lane_of[layer]]
        step = Step(storage, self.rows, self.pads, self.layer_lengths[layer], 0)
        view = GroupStep(lane, step, [], self._tables[lane.group])
        return PagedView(layer, view).dense

    def fills_a_block(self) -> bool:
        """Whether the next token is the last of some row's block."""
        return any((row.num_tokens + 1) % self.pool.block_size == 0 for row in self.rows or [])

    def start_rows(self, root_keys: list[Hashable | None]) -> list[Sequence]:
        """Makes an empty row per key; those with a key take part in prefix sharing."""
        self.rows = [self.pool.manager.new_sequence(key) for key in root_keys]
        self.pads = [0] * len(root_keys)
        return self.rows

    def begin_at(self, length: int, pads: list[int], root_keys: list[Hashable | None]) -> None:
        """The rows hold their first `length` columns already, in all layers."""
        self.length, self.pads, self.root_keys = length, list(pads), root_keys
        self.layer_lengths = dict.fromkeys(self.layer_lengths, length)

    def begin(self, inputs: StepInputs) -> Step:
        """Opens the step of a forward that a hook announced: `finish` or `abort` closes it.

        Raises:
            OutOfBlocksError: Too few blocks for all rows; nothing was changed.
        """
        step = self._open(inputs)
        self._is_hooked = True
        return step

    def finish(self) -> None:
        """The forward returned."""
        step, self.open, self._is_hooked = self.open, None, False
        if step is None:
            return
        if step.num_updates == 0 and self.layer_lengths:  # the model never called: nothing was computed
            self._take_back(step)
            return
        for row in step.rows:
            self.pool.manager.commit(row, self.keep_past)

    def abort(self) -> None:
        """The forward did not return: its tokens are taken back, in all layers."""
        step, self.open, self._is_hooked = self.open, None, False
        if step is not None:
            self._take_back(step)

    def settle(self) -> None:
        """Closes a step that is still open: an announced one was interrupted, any other is over."""
        if self._is_hooked:
            self.abort()
        else:
            self.finish()

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Step.update`; opens a step if the forward was not announced."""
        start, (batch, _, q_len, _) = self.layer_lengths[layer], keys.shape
        step = self.open
        if step is None or step.start != start or step.q_len != q_len or len(step.rows) != batch:
            step = self._unannounced(layer, start, batch, q_len)
        result = step.update(layer, keys, values)
        self.layer_lengths[layer] = start + q_len
        return result

    def select(self, indices: list[int]) -> None:
        """Row `i` becomes what row `indices[i]` was; nothing is copied."""
        self.settle()
        if self.rows is not None:
            wrong = [i for i in indices if not -len(self.rows) <= i < len(self.rows)]
            if wrong:
                raise InvalidRequestError(f"row {wrong[0]} is asked for, the cache has {len(self.rows)} rows.")
            self.rows = self.pool.manager.select(self.rows, indices)
            self.pads = [self.pads[i] for i in indices]
            self.root_keys = self.root_keys and [self.root_keys[i] for i in indices]

    def crop(self, num_columns: int) -> None:
        """Takes the last `num_columns` columns off, and lets go of what windows no longer see."""
        self.settle()
        self._require_past(num_columns)
        self.length = max(self.length - num_columns, 0)
        for layer, length in self.layer_lengths.items():
            self.layer_lengths[layer] = min(length, self.length)
        for row, pad in zip(self.rows or [], self.pads, strict=True):
            self.pool.manager.truncate(row, max(self.length - pad, 0))
            self.pool.manager.commit(row)

    def fork(self) -> "PagedState":
        """Another state on the same blocks."""
        self.settle()
        other = PagedState(self.pool, self.cache_salt)
        if self.rows is not None:
            other.rows = [self.pool.manager.fork(row) for row in self.rows]
        other.pads, other.length = list(self.pads), self.length
        other.layer_lengths = dict(self.layer_lengths)
        other.light_key = self.light_key
        other.root_keys, other.keep_past, other.is_released = self.root_keys, self.keep_past, self.is_released
        return other

    def clear(self) -> None:
        """Gives all blocks back; the state is as new."""
        rows, self.rows, self.open = self.rows, None, None
        for row in rows or []:
            self.pool.manager.release(row)
        self.pads, self.length, self.root_keys, self._is_hooked = [], 0, None, False
        self.layer_lengths = dict.fromkeys(self.layer_lengths, 0)

    def forget_tokens(self) -> None:
        """From here on nothing of these rows enters the prefix index."""
        self.root_keys = None
        for row in self.rows or []:
            row.forget_tokens()

    def expand(self, batch: int) -> None:
        """Repeats each row, as `generate` does for beams and returned sequences, until there are `batch`."""
        assert self.rows is not None
        if batch % len(self.rows):
            raise InvalidRequestError(
                f"the forward has {batch} rows, the cache holds {len(self.rows)}: use as many, a multiple of them, "
                "or a new PagedCache."
            )
        repeats = batch // len(self.rows)
        if repeats > 1:
            self.select([i for i in range(len(self.rows)) for _ in range(repeats)])

    def _open(self, inputs: StepInputs) -> Step:
        self.require_alive()
        self.settle()
        if self.rows is None:
            self.start_rows([None] * inputs.batch)
        self.expand(inputs.batch)
        assert self.rows is not None
        end = self.length + inputs.q_len
        slots = inputs.grow(self.pool.manager, self.rows, self.length)
        step = Step(
            self.pool.storage,
            self.rows,
            inputs.pads,
            self.length,
            inputs.q_len,
            inputs.lazy,
            inputs.is_regular,
            inputs.needs_weights,
            not self.pool.has_attention_interface,
            self.pads,
            self._lens,
        )
        step.groups = tuple(
            GroupStep(lane, step, slots[lane.group], self._tables[lane.group]) for lane in self.pool.storage.lanes
        )
        self.open, self.pads, self.length = step, inputs.pads, end
        return step

    def _unannounced(self, layer: int, start: int, batch: int, q_len: int) -> Step:
        """The step of a forward that no hook announced, or announced with other shapes."""
        if self._is_hooked and self.open is not None and self.open.num_updates == 0:
            logger.debug("the model gives %d rows of %d tokens, not those of its inputs", batch, q_len)
            self.abort()
            self.can_announce = False
            if self.length == 0:
                self.clear()
        if start == 0 and sum(length > 0 for length in self.layer_lengths.values()) == 1:
            self.clear()
            raise InvalidRequestError(
                f"one layer brought K and V twice before layer {layer} brought any. In an encoder-decoder, "
                f"{WITH_CROSS_ATTENTION} If the forward before this one failed, call again: the cache is as new."
            )
        if start != self.length:
            raise PagedCacheError(
                f"layer {layer} is at token {start}, the cache at {self.length}: an earlier forward failed half-way, or "
                "layers do not advance together. Use a new PagedCache, or reset() this one."
            )
        if not self.is_patched:
            _hint_unpatched()
        self.forget_tokens()
        pads = self.pads if len(self.pads) == batch else [0] * batch
        if self.rows is not None and len(self.rows) != batch:
            self.expand(batch)
            pads = self.pads
        return self._open(StepInputs(batch, q_len, pads))

    def _take_back(self, step: Step) -> None:
        for row, pad in zip(step.rows, step.pads, strict=True):
            self.pool.manager.truncate(row, max(step.start - pad, 0))
        self.length, self.pads = step.start, step.known_pads
        for layer, length in self.layer_lengths.items():
            self.layer_lengths[layer] = min(length, step.start)

    def _require_past(self, num_columns: int) -> None:
        """Raises `RuntimeError`, as transformers' layers do, if a window lacks blocks of the past that a crop returns to."""
        for row, pad in zip(self.rows or [], self.pads, strict=True):
            if not self.pool.manager.can_truncate(row, max(self.length - num_columns - pad, 0)):
                raise RuntimeError(
                    f"crop by {num_columns} tokens: the sliding window has moved past and its blocks went back to the "
                    "pool. Call activate_past_recording() before the tokens that may be taken back."
                )

    def require_alive(self) -> None:
        """Raises `PagedCacheError` after `PagedCache.release`."""
        if self.is_released:
            raise PagedCacheError("this PagedCache was released: make a new one, PagedCache(pool).")
