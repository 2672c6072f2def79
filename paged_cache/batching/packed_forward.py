"""Model execution without padding: all rows of a step side by side in one forward of `[1, num_tokens]`."""

import inspect
from typing import Any

import torch

from ..compat import base_model
from ..devices import input_device, is_spread
from ..errors import UnsupportedModelError
from ..memory.growth import Growth
from ..memory.sequence import Sequence
from ..packed import PackedCache
from ..pool import BlockPool
from .request import Chunk


class PackedForward:
    """Runs the chunks of a step as one forward.

    Args:
        model: Called with `input_ids`, `position_ids` and the cache; patched.
        pool: Its pool.
    """

    name = "packed"
    whole_prompts = False

    def __init__(self, model: Any, pool: BlockPool) -> None:
        self.model, self.pool = model, pool
        self._manager, self._device = pool.manager, input_device(base_model(model))
        self._num_layers = len(pool.spec.layers)
        self._cache = PackedCache(pool)
        inner = getattr(model, "_orig_mod", model)
        self._can_select = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._is_spread = is_spread(inner)

    def __call__(self, chunks: list[Chunk]) -> torch.Tensor:
        """Computes the chunks' tokens: all of them, or none if anything is raised.

        Returns:
            Logits `[num_ready, vocab_size]`: behind the last token of each row that has no token left to compute, in the
            order of the chunks.

        Raises:
            OutOfBlocksError: Too few blocks; nothing was changed.
        """
        rows = [chunk.row.sequence for chunk in chunks]
        try:
            self._cache.begin(rows, [chunk.num_tokens for chunk in chunks], self._grow(chunks))
            logits = self._run(chunks)
            self._manager.commit_all(rows)
        except BaseException:
            for chunk in chunks:
                self._manager.truncate(chunk.row.sequence, chunk.row.num_computed)
            raise
        finally:
            self._cache.end()
        for _, row, num_tokens in chunks:
            row.num_computed += num_tokens
        return logits

    def settle(self) -> None:
        """Nothing: rows keep nothing outside the pool."""

    def _grow(self, chunks: list[Chunk]) -> list[list[int]]:
        """Per layer group the slots of all new tokens."""
        single, longer = _Part(), _Part()
        for _, row, num_tokens in chunks:
            part = single if num_tokens == 1 else longer
            part.sequences.append(row.sequence)
            part.tokens.append(row.tokens[row.num_computed : row.num_computed + num_tokens])
        is_mixed = bool(single.sequences and longer.sequences)
        slots = [[] for _ in self._manager.windows] if not longer.sequences else longer.extend(self._manager)
        if not single.sequences:
            return [[slot for row in rows for slot in row] for rows in slots]
        ones = self._manager.append(single.sequences, [ids[0] for ids in single.tokens])
        if not is_mixed:
            return ones
        merged = []
        for group_ones, group_rows in zip(ones, slots, strict=True):
            one, more = iter(group_ones), iter(group_rows)
            merged.append([slot for c in chunks for slot in ([next(one)] if c.num_tokens == 1 else next(more))])
        return merged

    def _run(self, chunks: list[Chunk]) -> torch.Tensor:
        ids: list[int] = []
        positions: list[int] = []
        lasts: list[int] = []
        for _, row, num_tokens in chunks:
            start, end = row.num_computed, row.num_computed + num_tokens
            if num_tokens == 1:
                ids.append(row.tokens[start])
                positions.append(start)
            else:
                ids += row.tokens[start:end]
                positions += range(start, end)
            if end == len(row.tokens):
                lasts.append(len(ids) - 1)
        inputs = torch.tensor([[ids], [positions]], device=self._device)
        options = {"logits_to_keep": self._kept(lasts, len(ids))} if self._can_select else {}
        output = self.model(
            input_ids=inputs[0],
            position_ids=inputs[1],
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        if self._cache.num_updates != self._num_layers:
            raise UnsupportedModelError(
                f"{self._cache.num_updates} of {self._num_layers} layers stored their K and V in a packed forward."
            )
        logits: torch.Tensor = output.logits[0].to(self._device)
        if not lasts:
            return logits[:0]
        return logits if self._can_select else logits[lasts]

    def _kept(self, lasts: list[int], num_tokens: int) -> Any:
        """`logits_to_keep` for the logits at `lasts`; all are 0."""
        if not lasts:
            return 1
        if len(lasts) == num_tokens:
            return 0
        # accelerate would move a tensor to where the model begins, but the model indexes where its layers end
        return lasts if self._is_spread else torch.tensor(lasts, device=self._device)


class _Part:
    """Sequences of a step and their new tokens."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.tokens: list[list[int]] = []

    def extend(self, manager: Any) -> list[list[list[int]]]:
        """Makes room: slots per layer group and row."""
        pairs = zip(self.sequences, self.tokens, strict=True)
        slots: list[list[list[int]]] = manager.extend([Growth(row, len(ids), ids) for row, ids in pairs]).slots
        return slots
