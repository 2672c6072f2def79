"""How many requests fit: each in memory of its own, as rows of a padded batch, and in blocks."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..memory.windows import Windows
from .kinds import LayerKind
from .states import States

CONTEXTS = (1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)


@dataclass(frozen=True)
class Lengths:
    """Requests that are to run at the same time.

    Attributes:
        requests: Prompt and output tokens of each; requests of other numbers are like these on average.
        shared_prefix_len: Tokens that all prompts start with, before those of `requests`.
        num_beams: Rows of a request.
        source: Where lengths are from, in words; empty if they were given.
    """

    requests: tuple[tuple[int, int], ...]
    shared_prefix_len: int = 0
    num_beams: int = 1
    source: str = ""

    @property
    def are_equal(self) -> bool:
        """Whether all prompts are as long as each other, and all outputs."""
        return len(set(self.requests)) == 1

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and of the longest output: what a row of a padded batch holds."""
        return (
            self.shared_prefix_len + max(prompt for prompt, _ in self.requests) + max(out for _, out in self.requests)
        )

    @property
    def mean(self) -> tuple[float, float]:
        """Tokens of a prompt, the shared ones included, and of an output."""
        count = len(self.requests)
        prompts, outputs = (sum(each) / count for each in zip(*self.requests, strict=True))
        return self.shared_prefix_len + prompts, outputs


@dataclass(frozen=True)
class Way:
    """One way to hold the requests.

    Attributes:
        name: "contiguous", "padded", "paged" or "one pass".
        bytes_per_request: K, V and states of one request when it holds most, on average, without what all share.
        shared_bytes: What all share.
        num_requests: How many fit.
    """

    name: str
    bytes_per_request: float
    shared_bytes: int
    num_requests: int


@dataclass(frozen=True)
class ContextLine:
    """Requests of one length.

    Attributes:
        num_tokens: Of a request, prompt and output.
        kv_bytes: K and V of one request in blocks, and its states.
        paged: Requests that fit in blocks.
        contiguous: Requests that fit if each reserves the whole context.
    """

    num_tokens: int
    kv_bytes: int
    paged: int
    contiguous: int


@dataclass(frozen=True)
class Room:
    """The memory for K, V and states, and what a request takes of it.

    Attributes:
        memory: Bytes.
        context: Tokens that contiguous memory reserves for a row.
        windows: Of the pool's layer groups.
        block_nbytes: Of one block.
        kinds: The layers.
        itemsize: Bytes of an element outside of blocks.
        states: Of a row.
        shares: Whether rows may share the blocks of tokens that they begin with.
    """

    memory: int
    context: int
    windows: Windows
    block_size: int
    block_nbytes: int
    kinds: tuple[LayerKind, ...]
    itemsize: int
    states: States
    shares: bool

    def contiguous(self, lengths: Lengths) -> Way:
        """As with `StaticCache`: every row reserves the context."""
        return self._rows("contiguous", self.context, lengths.num_beams)

    def padded(self, lengths: Lengths) -> Way:
        """As in a batch with `DynamicCache`: every row is as long as the longest, less the last token, which is never fed back."""
        return self._rows("padded", lengths.longest - 1, lengths.num_beams)

    def paged(self, lengths: Lengths) -> Way:
        """As in a `BlockPool` at the end of all requests: every row has the blocks that its tokens need, the last one partly filled."""
        return self._in_blocks("paged", lengths, self.windows)

    def one_pass(self, lengths: Lengths) -> Way:
        """As in one `generate` with a `PagedCache`: until all prompts are read, layers with a window hold them whole as well."""
        name, whole = "one pass", Windows([None] * len(self.windows), self.block_size)
        prompts = replace(lengths, requests=tuple((prompt, 1) for prompt, _ in lengths.requests))
        read, end = self._in_blocks(name, prompts, whole), self.paged(lengths)
        return read if read.num_requests < end.num_requests else replace(end, name=name)

    def _in_blocks(self, name: str, lengths: Lengths, windows: Windows) -> Way:
        prefix = lengths.shared_prefix_len // self.block_size if self.shares else 0
        shared = sum(windows.held(prefix)) * self.block_nbytes
        total = sum(self._paged_bytes(prompt, output, lengths, prefix, windows) for prompt, output in lengths.requests)
        count = len(lengths.requests)
        return Way(name, total / count, shared, max(self.memory - shared, 0) * count // total)

    def lines(self, contexts: Iterable[int]) -> tuple[ContextLine, ...]:
        """Requests of these lengths, each with a prompt of its own and one row."""
        contiguous = self.contiguous(Lengths(((1, 1),))).num_requests
        found = []
        for num_tokens in contexts:
            way = self.paged(Lengths(((num_tokens - 1, 1),)))
            found.append(ContextLine(num_tokens, int(way.bytes_per_request), way.num_requests, contiguous))
        return tuple(found)

    def _rows(self, name: str, num_tokens: int, num_rows: int) -> Way:
        """Requests whose rows have room for so many tokens, or as many as a layer's window."""
        keys_and_values = sum(
            kind.count * kind.numel * min(num_tokens, kind.window or num_tokens) for kind in self.kinds
        )
        nbytes = num_rows * (keys_and_values * self.itemsize + self._state_bytes(num_tokens))
        return Way(name, nbytes, 0, self.memory // nbytes)

    def _paged_bytes(self, prompt: int, output: int, lengths: Lengths, prefix: int, windows: Windows) -> int:
        prompt += lengths.shared_prefix_len
        num_tokens = prompt + output - 1  # the last one is never fed back
        blocks = self._blocks(prompt, num_tokens, lengths.num_beams, prefix, windows)
        return blocks * self.block_nbytes + lengths.num_beams * self._state_bytes(num_tokens)

    def _blocks(self, prompt: int, num_tokens: int, num_rows: int, prefix: int, windows: Windows) -> int:
        """Blocks of one request besides the first `prefix`: its rows share the full blocks of its prompt, at best nothing else."""
        total = -(-num_tokens // self.block_size)
        common = prompt // self.block_size if self.shares else 0
        blocks = 0
        for held in windows.held(total):
            first = max(total - held, prefix)
            blocks += max(common - first, 0) + num_rows * (total - max(first, common))
        return blocks

    def _state_bytes(self, num_tokens: int) -> int:
        return self.states.nbytes + num_tokens * self.states.bytes_per_token


def contexts_up_to(limit: int) -> list[int]:
    """The usual lengths below a limit, and the limit."""
    return [*(context for context in CONTEXTS if context < limit), limit]
