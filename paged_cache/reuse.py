"""Rows that begin with what the pool holds of their prompts."""

from collections.abc import Hashable

from .memory.manager import BlockManager
from .memory.sequence import Sequence
from .memory.starting import Start
from .prompt import Prompt
from .state import PagedState

RootKeys = list[Hashable | None]


def row_keys(state: PagedState, first_positions: list[int]) -> RootKeys | None:
    """Per row what K and V depend on besides tokens, as the model stands now; None if nothing may be shared."""
    keys = {position: state.pool.root_key(state.cache_salt, position) for position in set(first_positions)}
    return None if None in keys.values() else [keys[position] for position in first_positions]


def start_from_prefix(state: PagedState, prompt: Prompt, keys: RootKeys, limit: int) -> int:
    """Makes the rows of an empty state, with the blocks that the pool holds of their prompts.

    Args:
        state: Gets the rows.
        prompt: All columns of the rows, with their tokens.
        keys: Per row what else its K and V depend on.
        limit: Most columns to take.

    Returns:
        The columns that need no computation: the same number for all rows, as many as the worst row has.
    """
    manager, tokens = state.pool.manager, prompt.tokens
    assert tokens is not None
    state.light_key = state.pool.light_key()
    with manager.lock:
        rows = state.start_rows(keys)
        columns, starts = _known(manager, rows, prompt, limit, from_host=True)
        # each row alone finds room for what host memory has of it, all of them together may not
        if len(manager.host) and manager.num_needed(starts) > manager.num_free:
            columns, starts = _known(manager, rows, prompt, limit, from_host=False)
        manager.take_prefixes(starts)
        state.begin_at(columns, prompt.pads, keys)
    manager.counters.prefix_queries += sum(len(ids) for ids in tokens)
    manager.counters.prefix_hits += sum(max(columns - pad, 0) for pad in prompt.pads)
    return columns


def _known(
    manager: BlockManager, rows: list[Sequence], prompt: Prompt, limit: int, from_host: bool
) -> tuple[int, list[Start]]:
    """How many columns are known of all rows, up to `limit`, and the tokens in them that each row begins with."""
    columns, last = limit, -1
    row_tokens = list(zip(rows, prompt.pads, prompt.tokens or [], strict=True))
    while columns != last:  # what one row lacks may take blocks of a window away from another
        last = columns
        for row, pad, ids in row_tokens:
            columns = min(columns, pad + manager.match(row, ids, max(columns - pad, 0), from_host))
    return columns, [Start(row, ids, max(columns - pad, 0)) for row, pad, ids in row_tokens]
