"""Code of callers (processors, criteria, streamers, listeners, policies): whatever it raises is the affair of its request."""

from asyncio import CancelledError

from ..errors import PagedCacheError

RAISED = (Exception, SystemExit, GeneratorExit, CancelledError)
"""What such code may raise; Ctrl-C is somebody else's."""


def as_error(raised: BaseException) -> Exception:
    """What is no `Exception`, as one, for outputs."""
    if isinstance(raised, Exception):
        return raised
    return PagedCacheError(f"code of the request raised {type(raised).__name__}: {raised}")
