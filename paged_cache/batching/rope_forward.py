"""Model execution for models that encode positions by the length of what they compute, not by the positions alone."""

from typing import Any

import torch

from ..cache import PagedCache
from ..pool import BlockPool
from .padded_forward import OneByOneForward
from .request import Chunk, Row


class RopeForward(OneByOneForward):
    """Runs rows one by one, with every key as `generate` computes it for the row alone.

    A key is that of the length at which it was first computed. So what was generated and lost its blocks is computed anew
    one by one, but in models that start over beyond their original length, as `generate` lets them. Rope that remembers the
    longest row ("dynamic") is made to forget it before each forward.
    """

    def __init__(self, model: Any, pool: BlockPool) -> None:
        super().__init__(model, pool)
        self._ropes = [x for x in self._inner.modules() if "dynamic" in str(getattr(x, "rope_type", ""))]
        self._switch = self._length_to_start_over_at()

    def _length_to_start_over_at(self) -> int | None:
        """Where a model computes all keys anew with other frequencies; None if it never does."""
        original: int | None = getattr(self._inner.config, "original_max_position_embeddings", None)
        if original is None:
            return None
        ids = torch.zeros(1, original + 1, dtype=torch.long, device=self._device)
        inputs = self._inner.prepare_inputs_for_generation(ids, **{self._cache_name: PagedCache(self.pool)})
        return original if inputs.get(self._cache_name) is None else None

    def _pieces(self, chunk: Chunk) -> list[int]:
        row, end = chunk.row, chunk.row.num_computed + chunk.num_tokens
        if self._switch is not None:
            if row.num_computed <= self._switch < end:
                self._start_over(row)
            return [end - row.num_computed]
        num_generated = min(max(end - chunk.request.num_prompt_tokens, 0), chunk.num_tokens)
        of_prompt = chunk.num_tokens - num_generated
        return ([of_prompt] if of_prompt else []) + [1] * num_generated

    def _start_over(self, row: Row) -> None:
        row.num_computed = 0
        self.pool.manager.truncate(row.sequence, 0)

    def _prepare(self, ids: torch.Tensor, cache: PagedCache, inputs: dict[str, Any], is_first: bool) -> dict[str, Any]:
        for rope in self._ropes:
            for name in [name for name in vars(rope) if name.endswith("max_seq_len_cached")]:
                setattr(rope, name, 0)
        return super()._prepare(ids, cache, inputs, is_first) | {self._cache_name: cache}
