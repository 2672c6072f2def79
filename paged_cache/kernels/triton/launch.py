"""Launches of Triton kernels that cost the host a few microseconds.

`kernel[grid](...)` asks of every argument, constants included, which compiled kernel it means, and that takes longer than a
small kernel runs. A `CachedLaunch` only looks at what can change between two launches.
"""

from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

IS_KNOWN = (3, 6) <= tuple(int(x) for x in triton.__version__.split(".")[:2]) <= (3, 9)
"""Whether `CompiledKernel.run` takes what is given to it here; with another Triton all launches are ordinary ones."""
IS_AMD = torch.version.hip is not None
"""Whether Triton also makes a difference between tensors below 2 GiB and others."""


class CachedLaunch:
    """A kernel together with its constants: make one per static configuration, keep it, call it for every launch.

    The first call with arguments of a kind compiles as usual; later ones go to the compiled kernel at once. Arguments are
    of one kind where Triton makes no difference: the same are None, tensors agree in dtype and 16-byte alignment (for AMD
    also in whether their memory is below 2 GiB), and integers that are not in `do_not_specialize` agree in being 1 and in
    being divisible by 16. Under the interpreter, and while a debug setting or a hook is active, all launches are ordinary
    ones.

    Args:
        kernel: A `triton.jit` function whose `tl.constexpr` parameters come last.
        constants: All of those, by name, in order.
        **options: `num_warps`, `num_stages`, `enable_fp_fusion` and the like.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        names = list(kernel.arg_names)
        split = len(names) - len(constants)
        if names[split:] != list(constants):
            raise TypeError(f"the last parameters of the kernel are {names[split:]}, the constants {list(constants)}")
        self._kernel, self._constants, self._options = kernel, constants, options
        self._values = tuple(constants.values())
        self._is_jit = IS_KNOWN and isinstance(kernel, triton.JITFunction)
        self._is_specialised = [not x.do_not_specialize for x in kernel.params[:split]] if self._is_jit else []
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch on the device of the first argument, a tensor, and on the current stream there.

        Args:
            grid: Programs along each of the three axes.
            *args: All arguments that are not constants, in order: tensors, integers, floats, bools, None.
        """
        x, y, z = grid
        if not self._is_jit or self._is_watched():
            self._kernel[grid](*args, **self._constants, **self._options)
            return
        active = driver.active
        device = active.get_current_device()
        if args[0].is_cuda and args[0].get_device() != device:
            with torch.cuda.device(args[0].device):
                self(grid, *args)
            return
        key = (active, device, *self._kind(args))
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._kernel[grid](*args, **self._constants, **self._options)
            if isinstance(compiled, CompiledKernel):
                self._compiled[key] = compiled
            return
        stream = active.get_current_stream(device)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(x, y, z, stream, function, metadata, None, None, None, *args, *self._values)

    def _is_watched(self) -> bool:
        runtime = knobs.runtime
        return (
            runtime.debug
            or bool(self._kernel.pre_run_hooks)
            or getattr(runtime.launch_enter_hook, "calls", True)
            or getattr(runtime.launch_exit_hook, "calls", True)
        )

    def _kind(self, args: tuple[Any, ...]) -> list[Any]:
        """What Triton compiles kernels by."""
        kind: list[Any] = []
        add = kind.append
        for x, is_specialised in zip(args, self._is_specialised, strict=True):
            if x is None:
                add(None)
            elif isinstance(x, torch.Tensor):
                add(x.dtype)
                add(x.data_ptr() & 15)
                if IS_AMD:
                    add(x.untyped_storage().size() < 2**31)
            elif type(x) is int:
                is_int32 = -(2**31) <= x < 2**31
                add((is_int32, x == 1, x & 15 == 0) if is_specialised else is_int32)
            elif type(x) is float or type(x) is bool:
                add(type(x))
            else:
                raise TypeError(f"{x!r} is no tensor, integer, float, bool or None")
        return kind
