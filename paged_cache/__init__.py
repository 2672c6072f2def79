"""Paged KV memory under the transformers code you already have.

Names are imported when they are first used: `import paged_cache` and the command line do not wait for torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .errors import InvalidRequestError, OutOfBlocksError, PagedCacheError, UnsupportedModelError

if _TYPE_CHECKING:
    from .batching.asynchronous import AsyncContinuousBatcher, AsyncRequestHandle
    from .batching.batcher import ContinuousBatcher
    from .batching.handle import RequestHandle
    from .batching.output import RequestMetrics, RequestOutput
    from .batching.policy import Policy
    from .batching.stats import BatcherStats
    from .cache import PagedCache
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

_HOMES = {
    ".batching.asynchronous": (
        "AsyncContinuousBatcher",
        "AsyncRequestHandle",
    ),
    ".batching.batcher": ("ContinuousBatcher",),
    ".batching.handle": ("RequestHandle",),
    ".batching.output": (
        "RequestMetrics",
        "RequestOutput",
    ),
    ".batching.policy": ("Policy",),
    ".batching.stats": ("BatcherStats",),
    ".cache": ("PagedCache",),
    ".patching": (
        "is_patched",
        "patch",
        "unpatch",
    ),
    ".pool": ("BlockPool",),
    ".pool_stats": ("PoolStats",),
    ".prepacking": (
        "Prepacked",
        "prepack_weights",
    ),
}


def __getattr__(name: str) -> _Any:
    """A public name, from the module that defines it."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(home, __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
