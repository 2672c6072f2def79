"""The pool as the scheduler sees it: blocks of requests instead of blocks of sequences."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..memory.prefix import PrefixNode, exact_salt
from ..memory.sequence import Sequence
from ..memory.starting import Start
from ..memory.windows import Windows
from ..pool import BlockPool
from ..weights import Weights
from .adapter_store import AdapterStore
from .plan import Prefix
from .request import Chunk, Request, Row


class PoolMemory:
    """Gives requests blocks and takes them back; see `scheduler.Memory`.

    Args:
        pool: Where the blocks come from.
        shares_prefixes: Whether a prompt may begin with blocks that another request left.
        adapters: Those that requests may have; None if they have none.
    """

    def __init__(self, pool: BlockPool, shares_prefixes: bool, adapters: AdapterStore | None = None) -> None:
        self.pool, self._manager, self._adapters = pool, pool.manager, adapters
        self._shares_prefixes = shares_prefixes and pool.manager.prefix_caching
        self.num_blocks, self.block_size = pool.num_blocks, pool.block_size
        windows = pool.storage.layout.windows
        self._windows, self._has_windows = Windows(windows, pool.block_size), any(windows)
        lock = pool.weights.lock if pool.weights is not None else nullcontext()
        self._model_lock: AbstractContextManager[Any] = lock
        self._weights: Weights | None = None
        self._glances: dict[str | None, Hashable] = {}
        self._keys: dict[Hashable, Hashable] = {}
        self._light_key: Hashable = None
        self._coming: set[tuple[int, tuple[int, ...]]] = set()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self._manager.num_free

    def begin_step(self, running: list[Request]) -> None:
        """Looks anew at what K and V depend on; what running rows compute from here on is shared no more if it changed."""
        self._forget_keys()
        self._coming.clear()
        with self._model_lock:
            light_key, glances = self.pool.light_key(), self._glance(running)
        if light_key != self._light_key or any(self._glances.get(name) != seen for name, seen in glances.items()):
            self._light_key = light_key
            for request in running:
                key = self._root_key(request)
                for row in request.rows:
                    if row.sequence is not None and _root_key_of(row.sequence) != key:
                        row.sequence.forget_tokens()
        self._glances = glances

    def _glance(self, running: list[Request]) -> dict[str | None, Hashable]:
        weights = self.pool.weights
        if weights is None or not weights.tuners or not self._shares_prefixes:
            return {}
        return {name: weights.glance(name) for name in {request.adapter_name for request in running}}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a row of so many tokens holds, in all layer groups."""
        num_blocks = -(-num_tokens // self.block_size)
        return sum(self._windows.held(num_blocks)) if self._has_windows else num_blocks * len(self._windows)

    def blocks_at_most(self, request: Request, whole_prompt: bool) -> int:
        """Blocks that a request holds at its longest, alone in the pool.

        After a preemption all tokens are computed again, in one piece if `whole_prompt`. Then a row has blocks of the
        prompt to itself where prefixes are not shared, or where the other rows' are behind a window already.
        """
        num_tokens = request.num_prompt_tokens + request.max_new_tokens - 1  # the last one is never computed
        num_blocks = -(-num_tokens // self.block_size)
        shared = request.num_prompt_tokens // self.block_size if self._shares_prefixes else 0
        return sum(
            (request.num_rows - 1) * (held - shared if held == num_blocks else held)
            + (num_blocks if whole_prompt else held)
            for held in self._windows.held(num_blocks)
        )

    def growth(self, row: Row, num_tokens: int) -> int:
        """Most new blocks that computing so many more tokens of a row takes."""
        size, start = self.block_size, row.num_computed
        num_new = (-(-(start + num_tokens) // size) + -start // size) * len(self._windows)
        if start % size and row.sequence is not None:  # a shared block is copied before it is written
            num_new += sum(self._manager.allocator.ref_count(table[-1]) > 1 for table in row.sequence.tables)
        return num_new

    def look(self, request: Request) -> Prefix:
        """What the pool holds of the request's tokens, or will hold after this step."""
        key = self._root_key(request)
        if key is None:
            return Prefix(0, False, 0)
        manager = self._manager
        with manager.lock:
            sequence = manager.new_sequence(key)
            if sequence.node is None:
                return Prefix(0, False, 0)
            rows = [row.tokens for row in request.rows]
            starts = [Start(sequence, tokens, manager.match(sequence, tokens, len(tokens) - 1)) for tokens in rows]
            num_idle = manager.num_needed(starts)  # what comes from host memory needs free blocks as cached blocks do
            is_coming = bool(self._coming) and self._is_coming(starts[0])
            manager.release(sequence)
        return Prefix(starts[0].num_tokens, is_coming, num_idle)

    def admit(self, request: Request) -> None:
        """Makes the sequences of the request's rows, with what the pool holds of their tokens."""
        if self._adapters is not None and self._adapters.bring(request):
            self._forget_keys()
        key = self._root_key(request)
        is_first = request.admitted_time is None
        for row in request.rows:
            limit = row.num_tokens - 1
            with self._manager.lock:
                row.sequence = self._manager.new_sequence(key)
                row.num_computed = self._manager.match(row.sequence, row.tokens, limit)
                self._manager.take_prefix(row.sequence, row.tokens, row.num_computed)
            if is_first and key is not None:
                self._manager.counters.prefix_queries += row.num_tokens
                self._manager.counters.prefix_hits += row.num_computed
                request.cached_tokens = row.num_computed

    def expect(self, chunk: Chunk) -> None:
        """A prompt's next block is computed in this step: requests that start alike had better wait for it."""
        row, sequence = chunk.row, chunk.row.sequence
        if sequence is None or sequence.node is None:
            return
        if (sequence.node.depth + 1) * self.block_size <= row.num_computed + chunk.num_tokens:
            self._coming.add(self._next_block(sequence.node, row.tokens))

    def release(self, request: Request) -> None:
        """Takes all blocks of a request's rows; logits that wait would come again with their tokens."""
        request.held.clear()
        if self._adapters is not None:
            self._adapters.let_go(request)
        for row in request.rows:
            self.release_row(row)

    def release_row(self, row: Row) -> None:
        """Takes the blocks of one row, which has to be computed anew."""
        if row.sequence is not None:
            self._manager.release(row.sequence)
        row.sequence, row.states, row.num_computed = None, None, 0

    def fork(self, row: Row, num_rows: int) -> list[Row]:
        """The row and copies of it on the same blocks, `num_rows` in all."""
        return [row, *(self._fork(row) for _ in range(num_rows - 1))]

    def select(self, rows: list[Row], parents: list[int]) -> list[Row]:
        """Row `i` of the result goes on from row `parents[i]`: forked where it is named twice, released where never."""
        if parents == list(range(len(rows))):
            return rows
        taken: set[int] = set()
        chosen = []
        for parent in parents:
            chosen.append(self._fork(rows[parent]) if parent in taken else rows[parent])
            taken.add(parent)
        for i, row in enumerate(rows):
            if i not in taken:
                self.release_row(row)
        return chosen

    def _fork(self, row: Row) -> Row:
        sequence = self._manager.fork(row.sequence) if row.sequence is not None else None
        return Row(list(row.tokens), row.num_computed, sequence, row.states)

    def _root_key(self, request: Request) -> Hashable | None:
        """All that the request's K and V depend on besides its tokens; asked once per step, since it takes time."""
        if not self._shares_prefixes:
            return None
        salt, name = exact_salt(request.cache_salt), request.adapter_name
        if (salt, name) not in self._keys:
            with self._model_lock:
                if self._weights is None and self.pool.weights is not None:
                    self._weights = self.pool.weights.read()
                weights = self._weights
                self._keys[salt, name] = None if weights is None else (weights.key(name), salt, 0)
        return self._keys[salt, name]

    def _forget_keys(self) -> None:
        self._weights = None
        self._keys.clear()

    def _is_coming(self, start: Start) -> bool:
        """Whether this step computes the block behind what is known."""
        node, size = start.sequence.node, self.block_size
        assert node is not None
        known = start.tokens[: -(-start.num_tokens // size) * size]
        return self._next_block([node, *self._manager.index.match(node, known, size)][-1], start.tokens) in self._coming

    def _next_block(self, node: PrefixNode, tokens: list[int]) -> tuple[int, tuple[int, ...]]:
        """What names the full block of these tokens behind a node."""
        start = node.depth * self.block_size
        return id(node), tuple(tokens[start : start + self.block_size])


def rows_with_blocks(requests: Mapping[str, Request]) -> Iterator[tuple[str, list[list[int]], int]]:
    """Of every row that has blocks: its request's id, its block tables, and how many tokens are in them."""
    for name, request in requests.items():
        for row in request.rows:
            if row.sequence is not None:
                yield name, row.sequence.tables, row.num_computed


def _root_key_of(sequence: Sequence) -> Hashable | None:
    """Under which key a sequence's tokens enter the prefix index; None if they do not."""
    node = sequence.node
    while node is not None and node.parent is not None:
        node = node.parent
    return None if node is None else node.key
