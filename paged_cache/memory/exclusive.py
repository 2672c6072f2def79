"""One thread at a time in an object's methods."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from ..errors import PagedCacheError

Method = TypeVar("Method", bound=Callable[..., Any])


def exclusive(method: Method) -> Method:
    """Holds `lock`; what an interrupted method (Ctrl-C, a failed copy) left half-done is put right by `_repair`."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            try:
                return method(self, *args, **kwargs)
            except PagedCacheError:  # raised before anything was changed
                raise
            except BaseException:
                self._repair()
                raise

    return cast(Method, run)
