"""What makes Triton's interpreter faster."""

import pytest

from paged_cache.kernels.triton import attention


@pytest.fixture(autouse=True, scope="session")
def patched_once():
    """The interpreter patches Triton's language at each call of a function, though the kernel's launch has done it.

    Only modules other than `triton.language` are left to the functions, and stay as they are patched.
    """
    if not attention.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patched, call = set(), interpreter.InterpretedFunction.__call__

    def call_patched(self, *args, **kwargs):
        if id(self.fn.__globals__) in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(id(self.fn.__globals__))
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_patched)
        yield
