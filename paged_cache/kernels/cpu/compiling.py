"""How a numba function becomes a C function that is kept on the disk."""

import ctypes
import logging
import time
from collections.abc import Callable
from typing import Any

import numba
from numba.core import event

logger = logging.getLogger("paged_cache")


class _Announcement(event.Listener):
    """Says what somebody waits for, before the wait. Without effect where the compiled kernel comes from the disk."""

    def __init__(self, what: str) -> None:
        self.what, self.is_said = what, False

    def on_start(self, event: event.Event) -> None:
        """Called for each of the functions that the kernel consists of."""
        if not self.is_said:
            self.is_said = True
            logger.info("Compiling the CPU kernel for %s, once: some seconds.", self.what)

    def on_end(self, event: event.Event) -> None:
        """Nothing to say: the kernel is not yet complete."""


def compile_worker(work: Callable[[Any], None], what: str) -> Callable[[int], None]:
    """`work(pointer)` as a C function of an address, from numba's disk cache or compiled; `what` is for the log."""
    compiled: Any
    start = time.perf_counter()
    with event.install_listener("numba:compile", _Announcement(what)):
        try:
            compiled = numba.cfunc("void(voidptr)", cache=True)(work)
        except RuntimeError as error:
            if "cache" not in str(error):
                raise
            logger.warning("The compiled CPU kernel is not kept for the next start: %s", error)
            compiled = numba.cfunc("void(voidptr)")(work)
    if not compiled.cache_hits:
        logger.info("Compiled the CPU kernel in %.1f s.", time.perf_counter() - start)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
