"""Paged KV memory under the transformers code you already have."""

from .cache import PagedCache
from .errors import InvalidRequestError, OutOfBlocksError, PagedCacheError, UnsupportedModelError
from .patching import is_patched, patch, unpatch
from .pool import BlockPool, PoolStats

__version__ = "0.1.0"

__all__ = [
    "BlockPool",
    "InvalidRequestError",
    "OutOfBlocksError",
    "PagedCache",
    "PagedCacheError",
    "PoolStats",
    "UnsupportedModelError",
    "__version__",
    "is_patched",
    "patch",
    "unpatch",
]
