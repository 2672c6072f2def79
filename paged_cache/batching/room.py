"""What is left for a step while it is planned. Plain Python."""

from bisect import bisect_right
from typing import Any

from .plan import Memory


class Room:
    """Tokens and blocks that a step may still take.

    Args:
        memory: Says what rows need.
        tokens, blocks: What there is at first.
        whole_prompts: Prompts come in one piece: as many as there are tokens for, but one in any case.
        max_chunk: Most tokens of a row.
    """

    def __init__(self, memory: Memory, tokens: int, blocks: int, whole_prompts: bool, max_chunk: int | None) -> None:
        self._growth = memory.growth
        self._whole_prompts, self._max_chunk = whole_prompts, max_chunk
        self.tokens, self.blocks = tokens, blocks
        self._has_prompt = False

    def take(self, row: Any, num_tokens: int) -> None:
        """Counts so many tokens of a row as planned."""
        self.tokens -= num_tokens
        self.blocks -= self._growth(row, num_tokens)

    def take_prompt(self, row: Any, num_tokens: int) -> None:
        """The same for a piece of a prompt."""
        self.take(row, num_tokens)
        self._has_prompt = True

    def takes_prompts(self) -> bool:
        """Whether there are tokens for a piece of a prompt."""
        return self.tokens > 0 or (self._whole_prompts and not self._has_prompt)

    def piece(self, row: Any, num_to_go: int) -> int:
        """How many of a prompt's tokens fit into the step."""
        growth = self._growth
        if self._whole_prompts:
            fits = num_to_go <= self.tokens or not self._has_prompt
            return num_to_go if fits and growth(row, num_to_go) <= self.blocks else 0
        num_tokens = min(num_to_go, self.tokens, self._max_chunk or num_to_go)
        if num_tokens <= 0 or growth(row, num_tokens) <= self.blocks:
            return max(0, num_tokens)
        return bisect_right(range(1, num_tokens), self.blocks, key=lambda count: growth(row, count))
