"""Model execution for models whose rows cannot be packed: prompts one by one, decoding rows in a padded batch."""

import inspect
from typing import Any

import torch
from transformers import EncoderDecoderCache

from ..cache import PagedCache
from ..compat import base_model
from ..devices import input_device
from ..errors import UnsupportedModelError
from ..layers import copy_states
from ..pool import BlockPool
from .request import Chunk, Row
from .row_states import RowStates, join, split


class PaddedForward:
    """Runs the chunks of a step as one forward per prompt and one for the rows that decode.

    Prompts are computed whole and without padding, since states of linear attention begin at a prompt's first token. Rows
    that decode are padded on the left, which nothing is stored for.

    Args:
        model: Called as `generate` would call it; patched.
        pool: Its pool.
    """

    name = "padded"
    whole_prompts = True

    def __init__(self, model: Any, pool: BlockPool) -> None:
        self.model, self.pool = model, pool
        self._inner = getattr(model, "_orig_mod", model)
        self._device = input_device(base_model(model))
        parameters = inspect.signature(self._inner.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._has_positions = "position_ids" in parameters
        self._has_mask = "attention_mask" in parameters
        self._can_select = "logits_to_keep" in parameters
        self._rows: list[Row] = []
        self._cache: PagedCache | None = None

    def __call__(self, chunks: list[Chunk]) -> torch.Tensor:
        """Computes the chunks' tokens; see `PackedForward`. If one fails, `num_computed` of those before it is what it would be."""
        decoding = [chunk.row for chunk in chunks if self._goes_together(chunk)]
        logits = {id(row): x for row, x in zip(decoding, self._decode(decoding) if decoding else [], strict=True)}
        for chunk in chunks:
            if id(chunk.row) not in logits:
                for num_tokens in self._pieces(chunk):
                    self._prefill(chunk.row, num_tokens, logits)
        ready = [logits[id(row)] for _, row, _ in chunks if id(row) in logits]
        return torch.stack(ready) if ready else torch.empty(0, 1)

    def _goes_together(self, chunk: Chunk) -> bool:
        return chunk.row.num_computed > 0

    def _pieces(self, chunk: Chunk) -> list[int]:
        """Tokens of each forward for a chunk that runs by itself."""
        return [chunk.num_tokens]

    def _prefill(self, row: Row, num_tokens: int, logits: dict[int, torch.Tensor]) -> None:
        start, end = row.num_computed, row.num_computed + num_tokens
        cache = self._cache_of([row], start)
        try:
            out = self._forward([row.tokens[start:end]], cache, [0], end)
            row.states = split(cache.layers, 1)[0]
        finally:
            _let_go(cache)
        row.num_computed = end
        if end == row.num_tokens:
            logits[id(row)] = out[0]

    def _decode(self, rows: list[Row]) -> torch.Tensor:
        length = max(row.num_computed for row in rows)
        pads = [length - row.num_computed for row in rows]
        self._assemble(rows, length, pads)
        assert self._cache is not None
        try:
            out = self._forward([[row.tokens[row.num_computed]] for row in rows], self._cache, pads, length + 1)
        except BaseException:
            self.settle()
            for row in rows:  # their states may be behind this token, which nobody can take back
                row.num_computed = row.num_tokens
            raise
        for row in rows:
            row.num_computed += 1
        return out

    def _assemble(self, rows: list[Row], length: int, pads: list[int]) -> None:
        """Makes `_cache` hold these rows; the one of the step before is kept if it does."""
        cache = self._cache
        if cache is not None and len(rows) == len(self._rows) and all(map(_is, rows, self._rows)):
            state = cache._state
            if state.rows is not None and all(a.sequence is b for a, b in zip(rows, state.rows, strict=True)):
                return
        self.settle()
        self._cache, self._rows = self._cache_of(rows, length, pads), list(rows)

    def settle(self) -> None:
        """Gives the rows that decoded together their states back: call it before rows are forked."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        for row, states in zip(self._rows, split(cache.layers, len(self._rows)), strict=True):
            if row.sequence is not None:
                row.states = states
        _let_go(cache)
        self._rows = []

    def _cache_of(self, rows: list[Row], length: int, pads: list[int] | None = None) -> PagedCache:
        cache = PagedCache(self.pool)
        state = cache._state
        state.rows = [row.sequence for row in rows]
        state.begin_at(length, pads or [0] * len(rows), [None] * len(rows))
        state.root_keys = None
        states: list[RowStates] = [row.states for row in rows if row.states is not None]
        for layer, values in zip(cache.layers, join(states), strict=False):
            copy_states(values, layer)
        return cache

    def _forward(self, ids: list[list[int]], cache: PagedCache, pads: list[int], length: int) -> torch.Tensor:
        """Logits `[rows, vocab_size]` behind each row's last token."""
        device, q_len = self._device, len(ids[0])
        columns = torch.arange(length, device=device)
        mask = (columns >= torch.tensor(pads, device=device)[:, None]).long()
        inputs: dict[str, Any] = {"use_cache": True}
        if self._has_mask:
            inputs["attention_mask"] = mask
        if self._has_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -q_len:]
        if self._can_select:
            inputs["logits_to_keep"] = 1
        inputs = self._prepare(torch.tensor(ids, device=device), cache, inputs, is_first=q_len == length)
        output = self.model(**inputs, return_dict=True)
        if _remembers_more(getattr(output, self._cache_name, cache), cache):
            raise UnsupportedModelError("it keeps more between forwards than the cache that it is given.")
        logits: torch.Tensor = output.logits[:, -1].to(device)
        return logits

    def _prepare(self, ids: torch.Tensor, cache: PagedCache, inputs: dict[str, Any], is_first: bool) -> dict[str, Any]:
        """What the model makes of the inputs of a forward."""
        inputs = inputs | {self._cache_name: cache}
        prepared: dict[str, Any] = self._inner.prepare_inputs_for_generation(ids, is_first_iteration=is_first, **inputs)
        return prepared


class OneByOneForward(PaddedForward):
    """For models in which padding has an effect: rows that decode run one by one, too."""

    name = "single"

    def _goes_together(self, chunk: Chunk) -> bool:
        return False


def _is(a: Any, b: Any) -> bool:
    return a is b


def _remembers_more(returned: Any, cache: PagedCache) -> bool:
    """Whether the model made a cache of its own around the one that it was given, and put something into it."""
    if isinstance(returned, EncoderDecoderCache) and returned.self_attention_cache is cache:
        return returned.cross_attention_cache.get_seq_length() > 0
    return returned is not None and returned is not cache


def _let_go(cache: PagedCache) -> None:
    """The cache is done with; its sequences live on."""
    cache._state.settle()
    cache._state.rows = None
