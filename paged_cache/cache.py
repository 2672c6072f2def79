"""`PagedCache`: transformers' `Cache` contract over a shared pool of blocks."""

from collections.abc import Hashable
from types import TracebackType
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .errors import InvalidRequestError
from .layers import copy_states, paged_layer
from .memory.prefix import exact_salt
from .model_spec import cache_layers
from .pool import BlockPool
from .prompt import Prompt
from .reuse import row_keys, start_from_prefix
from .state import PagedState


class PagedCache(DynamicCache):
    """Keeps K and V in the blocks of a `BlockPool`; pass it to `generate` as `past_key_values`.

    A `DynamicCache` to all code that asks, with the same results. Prompts that start alike share blocks, `fork` and beam
    search share them until they are written, and blocks go back to the pool when the cache is released, leaves its
    `with` block or is collected.

    Args:
        pool: Made with `BlockPool.for_model` for the model that uses the cache.
        cache_salt: Prefixes are only shared among caches of the same salt (for example one per tenant).
    """

    def __init__(self, pool: BlockPool, *, cache_salt: Hashable = None) -> None:
        if not isinstance(pool, BlockPool):
            raise InvalidRequestError(
                f"PagedCache needs a BlockPool, got {type(pool).__name__}: BlockPool.for_model(model)."
            )
        try:
            hash(cache_salt)
        except TypeError:
            raise InvalidRequestError(
                f"cache_salt is {cache_salt!r}; it has to be hashable, such as a string."
            ) from None
        self._build(PagedState(pool, exact_salt(cache_salt)))

    def _build(self, state: PagedState) -> None:
        self._state = state
        templates = cache_layers(state.pool.spec.config)
        Cache.__init__(self, layers=[paged_layer(t, i, state) for i, t in enumerate(templates)])

    @classmethod
    def for_prompt(
        cls,
        pool: BlockPool,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        cache_salt: Hashable = None,
    ) -> "PagedCache":
        """A cache that starts with the longest prefix of the prompts that the pool holds.

        `get_seq_length()` is then the number of columns that need no computation, at most all but the last; `generate`
        with the same `input_ids` computes the rest.

        Args:
            pool: Where to look.
            input_ids: int `[batch, prompt_length]`, padded on the left.
            attention_mask: `[batch, prompt_length]`, 0 for padding.
            cache_salt: As in `PagedCache`.
        """
        cache = cls(pool, cache_salt=cache_salt)
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            raise InvalidRequestError(
                f"input_ids is {type(input_ids).__name__}; for_prompt takes a tensor [batch, prompt_length], and the mask "
                "after it: for_prompt(pool, **tokenizer(prompts, padding=True, return_tensors='pt'))."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise InvalidRequestError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}."
            )
        prompt = Prompt.read(input_ids, attention_mask, start=0)
        prompt.require_left_padding()
        if prompt.is_regular and pool.spec.is_prefix_exact:
            keys = row_keys(cache._state, [0] * prompt.batch if pool.numbers_tokens else prompt.pads)
            if keys is not None:
                start_from_prefix(cache._state, prompt, keys, limit=prompt.q_len - 1)
        return cache

    @property
    def pool(self) -> BlockPool:
        """Where the blocks come from."""
        return self._state.pool

    @property
    def block_tables(self) -> list[list[list[int]]]:
        """`block_tables[row][group]`: block ids in order; -1 where a block behind a window went back to the pool."""
        return [[list(table) for table in row.tables] for row in self._state.rows or []]

    def fork(self, n: int = 1) -> Any:
        """`n` caches on the same blocks (one cache for `n=1`, else a list); a block is copied when it is written."""
        if n < 1:
            raise InvalidRequestError(f"n is {n}; fork makes at least 1 cache.")
        forks = [self._fork() for _ in range(n)]
        return forks[0] if n == 1 else forks

    def _fork(self) -> "PagedCache":
        other = type(self).__new__(type(self))
        other._build(self._state.fork())
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            copy_states(mine, theirs)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "PagedCache":
        return self._fork()

    __copy__ = _fork

    def release(self) -> None:
        """Gives all blocks back; the cache cannot be used any more. Releasing twice does nothing."""
        self._state.clear()
        self._state.is_released = True

    def __enter__(self) -> "PagedCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def reset(self) -> None:
        """Gives all blocks back; the cache is as new."""
        self._state.require_alive()
        self._state.clear()
        super().reset()  # type: ignore[no-untyped-call]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row `i` continues what row `beam_idx[i]` was: tables are permuted, nothing is copied."""
        self._state.select(beam_idx.tolist())
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, on the same blocks."""
        rows = range(len(self._state.rows or []))
        self._state.select([i for i in rows for _ in range(repeats)])
        self._each_layer("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (ids or a bool mask), in that order."""
        if self._state.rows is not None:
            self._state.select(torch.arange(len(self._state.rows))[indices.cpu()].tolist())
        self._each_layer("batch_select_indices", indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens off; see `Cache.crop`.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: A sliding window moved past and the past was not recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative integer, got {tokens_to_remove}."
            )
        super().crop(tokens_to_remove)
        self._state.crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Blocks behind windows stay until the next `crop`."""
        self._state.keep_past = True
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def _each_layer(self, method: str, *args: Any) -> None:
        for layer in self.layers:
            if hasattr(layer, method):
                getattr(layer, method)(*args)

    def __repr__(self) -> str:
        rows = len(self._state.rows or [])
        return f"PagedCache({rows} rows, {self._state.length} tokens, {self._state.pool!r})"
