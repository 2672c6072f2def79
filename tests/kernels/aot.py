"""Compiles Triton kernels for a GPU that is not there, through their ordinary launcher, and reads the machine code.

The launcher runs on CPU tensors under a driver that only knows the target; every launch becomes a compilation with the
exact specialisation (divisibility, constants) that a GPU would get.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """One compiled kernel. `stack` and `local` are bytes per thread: more than 0 means that registers were spilled."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int  # bytes per program
    num_warps: int
    instructions: tuple[str, ...]  # of SASS, as LDGSTS.E.BYPASS.128
    loop: tuple[str, ...]  # those of the main loop, see `_main_loop`
    ttgir: str  # Triton's own last stage, which shows buffers
    hash: str  # the same for the same specialisation

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression from their start."""
        return sum(re.match(pattern, x) is not None for x in self.instructions)

    def count_in_loop(self, pattern: str) -> int:
        """The same in the main loop."""
        return sum(re.match(pattern, x) is not None for x in self.loop)


_read_before: dict[str, Machine] = {}
"""By hash: planner and merge are the same in many calls."""


class _Target:
    """What Triton asks of a driver when it only compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def have_tools() -> bool:
    """Whether this Triton brings what reads its binaries."""
    return (TOOLS / "cuobjdump").exists() and (TOOLS / "nvdisasm").exists()


def machine_code(launch: Callable[[], object], capability: int, folder: Path) -> list[Machine]:
    """What `launch()` would run on a GPU of the given compute capability (90 for 9.0). `folder` is for its files."""
    with compile_only(capability) as kernels:
        launch()
    for kernel in kernels:
        if kernel.hash not in _read_before:
            _read_before[kernel.hash] = _read(kernel, folder / f"{kernel.hash}.cubin")
    return [_read_before[kernel.hash] for kernel in kernels]


@contextmanager
def compile_only(capability: int) -> Iterator[list]:
    """Launches compile, and run nothing. Yields the list that the compiled kernels are appended to."""
    kernels = []
    run = triton.runtime.JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # of another target, or of a real GPU
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        self.device_caches.clear()

    with (
        mock.patch.object(driver, "_active", _Target(capability)),
        mock.patch.object(triton.runtime.JITFunction, "run", compile_instead),
    ):
        yield kernels


def _read(kernel, cubin: Path) -> Machine:
    cubin.write_bytes(kernel.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", str(cubin))
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    sass = _tool("nvdisasm", "-c", str(cubin))
    instructions, jumps_back = _parse(sass)
    return Machine(
        name=kernel.metadata.name,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        local=numbers["LOCAL"],
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        instructions=tuple(instructions),
        loop=_main_loop(instructions, jumps_back),
        ttgir=kernel.asm["ttgir"],
        hash=kernel.hash,
    )


def _parse(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, and where they jump back: (last, first) instruction of each loop."""
    instructions, labels, jumps_back = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_?\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        if found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", line):
            target = re.search(r"`\((\.L_?\w+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                jumps_back.append((len(instructions), labels[target[1]]))
            instructions.append(found[1])
    return instructions, jumps_back


def _main_loop(instructions: list[str], jumps_back: list[tuple[int, int]]) -> tuple[str, ...]:
    """Of the loops with most multiplications, on tensor cores where there are any, the shortest."""
    has_mma = any(x.startswith(("HMMA", "HGMMA")) for x in instructions)
    kinds = ("HMMA", "HGMMA") if has_mma else ("FFMA",)
    loops = [tuple(instructions[first : last + 1]) for last, first in jumps_back]
    return max(loops, key=lambda loop: (sum(x.startswith(kinds) for x in loop), -len(loop)), default=())


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
