"""Cached launches, under a driver without a GPU that notes what it is asked to launch."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402  triton may be missing
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from paged_cache.kernels.triton import launch  # noqa: E402
from paged_cache.kernels.triton.launch import CachedLaunch  # noqa: E402

GRID = (2, 3, 4)


def add(out, x, y, size, offset, factor, SIZE: tl.constexpr, KIND: tl.constexpr):
    """`out = (x + y) * factor + offset`."""
    i = tl.arange(0, SIZE)
    value = tl.load(x + i, mask=i < size)
    if y is not None:
        value += tl.load(y + i, mask=i < size)
    tl.store(out + i, value * factor + offset, mask=i < size)


class RecordingDriver:
    """What Triton asks of a driver; `launched` has the arguments of each launch, from the grid on."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.utils, self.num_loaded = self, 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: self.launched.append(args)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.num_loaded += 1
        return None, f"{name} {self.num_loaded}", 32, 0, 1024  # no module, so that none has to be unloaded


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[RecordingDriver]:
    """A driver and a compilation cache of the test's own."""
    fake = RecordingDriver()
    with mock.patch.object(driver, "_active", fake), mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(tmp_path)):
        yield fake


@pytest.fixture
def kernel(gpu: RecordingDriver) -> Any:
    """A kernel that nobody has compiled yet."""
    return triton.JITFunction(add, do_not_specialize=["offset"])


class Counted:
    """Counts the ordinary launches of a kernel."""

    def __init__(self, kernel: Any) -> None:
        self.count, self._run = 0, kernel.run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._run(*args, **kwargs)


@pytest.fixture
def ordinary(kernel: Any) -> Counted:
    """`count` of it says how often the kernel was launched the ordinary way."""
    kernel.run = Counted(kernel)
    return kernel.run


CONSTANTS = {"SIZE": 64, "KIND": "a"}
X = torch.zeros(64)
ARGS = (torch.zeros(64), X, X, 64, 3, 0.5)


def test_the_second_launch_is_the_first_one_again(gpu: RecordingDriver, kernel: Any, ordinary: Counted) -> None:
    """Same function, grid, stream and arguments, without asking the JIT."""
    add = CachedLaunch(kernel, CONSTANTS, num_warps=2)
    add(GRID, *ARGS)
    add(GRID, *ARGS)

    first, second = gpu.launched
    assert ordinary.count == 1
    assert first[:6] == second[:6] == (*GRID, 7, first[4], first[5])
    assert all(a is b for a, b in zip(first[9:], second[9:], strict=True))
    assert second[9:] == (*ARGS, *CONSTANTS.values())


def test_what_may_change_without_another_kernel(gpu: RecordingDriver, kernel: Any, ordinary: Counted) -> None:
    """Grids, tensors, floats, integers of one class, and all integers that are not specialised."""
    add = CachedLaunch(kernel, CONSTANTS)
    add(GRID, *ARGS)
    add((1, 1, 1), torch.ones(64), torch.ones(70), torch.ones(99), 32, 1, 2.5)
    add(GRID, *ARGS[:4], 16, 1.0)

    assert ordinary.count == 1
    assert len({x[4] for x in gpu.launched}) == 1
    assert gpu.launched[1][:3] == (1, 1, 1)
    assert gpu.launched[1][12:15] == (32, 1, 2.5)


OTHERS = {
    "dtype": (X.half(), X, X, 64, 3, 0.5),
    "None": (X, X, None, 64, 3, 0.5),
    "alignment": (X, torch.zeros(65)[1:], X, 64, 3, 0.5),
    "the integer 1": (X, X, X, 1, 3, 0.5),
    "an odd integer": (X, X, X, 63, 3, 0.5),
    "a large integer": (X, X, X, 64, 2**40, 0.5),
    "an integer for a float": (X, X, X, 64, 3, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_another_kernel(name: str, gpu: RecordingDriver, kernel: Any, ordinary: Counted) -> None:
    """Each is compiled once, and is another function than the plain call."""
    add = CachedLaunch(kernel, CONSTANTS)
    for args in (ARGS, OTHERS[name], ARGS, OTHERS[name]):
        add(GRID, *args)

    functions = [x[4] for x in gpu.launched]
    assert ordinary.count == 2
    assert functions[0] == functions[2] != functions[1] == functions[3]


def test_other_constants_and_options_are_other_kernels(gpu: RecordingDriver, kernel: Any) -> None:
    """They belong to the launch."""
    launches = [CachedLaunch(kernel, CONSTANTS), CachedLaunch(kernel, {**CONSTANTS, "SIZE": 32})]
    launches.append(CachedLaunch(kernel, CONSTANTS, num_warps=8))
    for add in launches * 2:
        add(GRID, *ARGS)

    functions = [x[4] for x in gpu.launched]
    assert functions[:3] == functions[3:]
    assert len(set(functions)) == 3


INTEGERS = (-(2**31) - 16, -(2**31), -16, -1, 0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 1)
TENSORS = (X, X.half(), X[1:], X[4:], torch.nn.Parameter(X), torch.nn.Parameter(X.half()), None)


def test_kinds_are_at_least_as_fine_as_tritons(kernel: Any) -> None:
    """Wherever Triton's own specialisation differs, the kind does."""
    add = CachedLaunch(kernel, CONSTANTS)
    bind = kernel.device_caches[0][4]
    calls = [(X, tensor, X, 64, 3, 0.5) for tensor in TENSORS]
    calls += [(X, X, X, integer, 3, 0.5) for integer in (*INTEGERS, True, 0.5)]
    calls += [(X, X, X, 64, integer, 0.5) for integer in (*INTEGERS, True, 0.5)]
    for one, other in itertools.combinations(calls, 2):
        if bind(*one, **CONSTANTS)[1] != bind(*other, **CONSTANTS)[1]:
            assert add._kind(one) != add._kind(other), (one[1:], other[1:])


def test_amd_kernels_depend_on_the_size_of_memory(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for tensors below 2 GiB have 32-bit offsets: larger ones need others."""
    specialise = pytest.importorskip("triton.backends.amd.compiler").HIPBackend.get_tensor_specialization
    add = CachedLaunch(kernel, CONSTANTS)
    sizes = (64, 2**29 - 1, 2**29, 2**30)  # of float32
    tensors = [torch.empty(size, device="meta") for size in sizes]
    wanted = [specialise(x, align=True) for x in tensors]
    assert wanted[0] == wanted[1] != wanted[2] == wanted[3]
    for is_amd in (False, True):
        monkeypatch.setattr(launch, "IS_AMD", is_amd)
        kinds = [add._kind((X, x[:64], X, 64, 3, 0.5)) for x in tensors]
        assert kinds[0] == kinds[1]
        assert kinds[2] == kinds[3]
        assert (kinds[1] != kinds[2]) == is_amd


def test_kinds_are_not_much_finer(kernel: Any) -> None:
    """Integers come in few kinds, and those that are not specialised in two: 32 and 64 bits."""
    add = CachedLaunch(kernel, CONSTANTS)
    assert len({tuple(add._kind((X, X, X, integer, 3, 0.5))) for integer in INTEGERS}) == 5
    assert len({tuple(add._kind((X, X, X, 64, integer, 0.5))) for integer in INTEGERS}) == 2


def test_hooks_and_debug_settings_get_ordinary_launches(
    gpu: RecordingDriver, kernel: Any, ordinary: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profilers see every launch."""
    add = CachedLaunch(kernel, CONSTANTS)
    add(GRID, *ARGS)
    add(GRID, *ARGS)
    assert ordinary.count == 1
    hook = mock.Mock()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        add(GRID, *ARGS)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert ordinary.count == 2
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "pre_run_hooks", [hook])
        add(GRID, *ARGS)
    assert ordinary.count == 3
    assert hook.call_count == 1
    add(GRID, *ARGS)
    assert ordinary.count == 3


def test_an_unknown_triton_gets_ordinary_launches(gpu: RecordingDriver, kernel: Any, ordinary: Counted) -> None:
    """Nothing is assumed about compiled kernels that may look different."""
    with mock.patch.object(launch, "IS_KNOWN", False):
        add = CachedLaunch(kernel, CONSTANTS)
    add(GRID, *ARGS)
    add(GRID, *ARGS)
    assert ordinary.count == len(gpu.launched) == 2


def test_another_driver_compiles_anew(gpu: RecordingDriver, kernel: Any) -> None:
    """A function of one driver never runs on another one."""
    add = CachedLaunch(kernel, CONSTANTS)
    add(GRID, *ARGS)
    other = RecordingDriver()
    kernel.device_caches.clear()
    with mock.patch.object(driver, "_active", other):
        add(GRID, *ARGS)
    add(GRID, *ARGS)
    assert (len(gpu.launched), len(other.launched)) == (2, 1)


def test_runs_under_the_interpreter() -> None:
    """The same object launches interpreted kernels."""
    out, x, y = torch.zeros(64), torch.arange(64.0), torch.ones(64)
    CachedLaunch(InterpretedFunction(add), CONSTANTS)((1, 1, 1), out, x, y, 64, 3, 0.5)
    assert torch.equal(out, (x + y) * 0.5 + 3)


def test_refuses_constants_that_are_not_the_last_parameters(kernel: Any) -> None:
    """Values would reach other parameters than those they are meant for."""
    with pytest.raises(TypeError, match="KIND"):
        CachedLaunch(kernel, {"KIND": "a", "SIZE": 64})


def test_refuses_arguments_that_it_cannot_tell_apart(kernel: Any) -> None:
    """A tuple would need a look inside."""
    with pytest.raises(TypeError, match="no tensor"):
        CachedLaunch(kernel, CONSTANTS)(GRID, *ARGS[:5], (0.5,))
