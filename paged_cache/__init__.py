"""Paged KV memory under the transformers code you already have."""

from .batching.asynchronous import AsyncContinuousBatcher, AsyncRequestHandle
from .batching.batcher import ContinuousBatcher
from .batching.handle import RequestHandle
from .batching.output import RequestMetrics, RequestOutput
from .batching.policy import Policy
from .batching.stats import BatcherStats
from .cache import PagedCache
from .errors import InvalidRequestError, OutOfBlocksError, PagedCacheError, UnsupportedModelError
from .patching import is_patched, patch, unpatch
from .pool import BlockPool
from .pool_stats import PoolStats
from .prepacking import Prepacked, prepack_weights

__version__ = "0.1.0"

__all__ = [
    "AsyncContinuousBatcher",
    "AsyncRequestHandle",
    "BatcherStats",
    "BlockPool",
    "ContinuousBatcher",
    "InvalidRequestError",
    "OutOfBlocksError",
    "PagedCache",
    "PagedCacheError",
    "Policy",
    "PoolStats",
    "Prepacked",
    "RequestHandle",
    "RequestMetrics",
    "RequestOutput",
    "UnsupportedModelError",
    "__version__",
    "is_patched",
    "patch",
    "prepack_weights",
    "unpatch",
]
