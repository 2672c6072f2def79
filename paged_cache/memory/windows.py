"""What each layer group still sees. Plain Python."""

from collections.abc import Iterable

from .prefix import PrefixNode


class Windows:
    """The windows of all layer groups, in blocks.

    Args:
        windows: Per layer group how many tokens, the newest included, attention can see; None for all.
        block_size: Tokens per block.
    """

    def __init__(self, windows: Iterable[int | None], block_size: int) -> None:
        self._windows = tuple(windows)
        self._block_size = block_size

    def __len__(self) -> int:
        return len(self._windows)

    def first_visible(self, num_tokens: int) -> list[int]:
        """Per group the first block that the token behind `num_tokens` sees."""
        return [
            0 if window is None else max(num_tokens - window + 1, 0) // self._block_size for window in self._windows
        ]

    def held(self, num_blocks: int) -> list[int]:
        """Per group most blocks that a sequence of so many keeps: its window may begin and end within a block."""
        size = self._block_size
        return [
            num_blocks if window is None else min(num_blocks, (window + size - 2) // size + 1)
            for window in self._windows
        ]

    def usable(self, nodes: list[PrefixNode], limit: int, from_host: bool = False) -> int:
        """The longest start of `nodes`, up to `limit` tokens, of which every group has what the next token sees.

        Args:
            nodes: A path in the index.
            limit: Most tokens.
            from_host: Blocks in host memory count.
        """
        usable, missing = 0, [-1] * len(self)
        for i, node in enumerate(nodes):
            blocks = map(_either, node.blocks, node.host_blocks) if from_host else node.blocks
            missing = [i if block is None else last for block, last in zip(blocks, missing, strict=True)]
            num_tokens = min((i + 1) * self._block_size, limit)
            if all(last < first for last, first in zip(missing, self.first_visible(num_tokens), strict=True)):
                usable = num_tokens
        return usable


def _either(block: int | None, other: int | None) -> int | None:
    return other if block is None else block
