"""Errors that callers may catch. Every message names the value that is wrong and what would be right."""


class PagedCacheError(Exception):
    """Base class of all errors raised by paged_cache."""


class OutOfBlocksError(PagedCacheError):
    """The pool cannot give as many blocks as an operation needs. Nothing was changed.

    Attributes:
        needed: Blocks the operation needs.
        free: Blocks that could be allocated at that moment, cached ones included.
    """

    def __init__(self, needed: int, free: int, message: str | None = None) -> None:
        super().__init__(
            message
            or f"{needed} blocks are needed, {free} can be allocated. Make the pool larger (num_blocks=, memory=), "
            "release caches that are no longer used, or use shorter or fewer sequences."
        )
        self.needed = needed
        self.free = free


class UnsupportedModelError(PagedCacheError):
    """The model cannot run on a paged cache; the message says why."""


class InvalidRequestError(PagedCacheError, ValueError):
    """An argument, a tensor or a combination of them is wrong. Nothing was changed."""
