"""`bench kernels`: first the ceilings (a plain read, a copy, a matrix product), then every shape.

Ours and its peers (SDPA on dense K and V, `DynamicCache`, gather and SDPA, torch's varlen attention) are checked against the
reference and timed in turns, on blocks in runs of random lengths, 16 on average unless the shape says otherwise. On CUDA
the times are those of graph replays over layers that are together at least four times as large as the L2 cache; on a CPU
an untimed call goes first unless the caches are to be cold.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ...memory import storage
from ..measuring import Tick
from ..results import Results
from ..results import environment as what_it_depends_on
from .assembling import assemble
from .candidates import Setting
from .machines import Cpu, Cuda, Machine, Rehearsal
from .measuring import measure
from .shapes import Shape, cpu_shapes, cuda_shapes, shrink
from .timing import Timing

MOST_ON_CPU = 6 * 2**30  # bytes
BUDGETS = {"cpu": 340.0, "cuda": 500.0}
Keep = Callable[[Results], object]


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        device: "cpu" or "cuda".
        sections: Of shapes; empty for all.
        pattern: A regular expression that a shape's name has to contain.
        quick: Few shapes, short.
        rehearse: With "cuda": small shapes on the CPU, through all that a GPU would do.
        seconds: Per shape; None for 0.4, or 0.05 when quick.
        budget: Seconds after which no shape is begun; None for what `BUDGETS` says.
        memory: GiB for one shape; None for what is free, on a CPU 6 at most.
        threads: Of the CPU; None for torch's own number.
        cold: On a CPU: layers in turn, so that caches do not help.
        order: Of a block's dimensions, "NHD" or "HND"; None for the storage's own.
        changes: Variants of ours.
        seed: Of all tensors and tables.
    """

    device: str = "cpu"
    sections: Sequence[str] = ()
    pattern: str = ""
    quick: bool = False
    rehearse: bool = False
    seconds: float | None = None
    budget: float | None = None
    memory: float | None = None
    threads: int | None = None
    cold: bool = False
    order: str | None = None
    changes: Sequence[Setting] = ()
    seed: int = 0

    @property
    def seconds_per_shape(self) -> float:
        """See `seconds`."""
        return self.seconds if self.seconds is not None else 0.05 if self.quick or self.rehearse else 0.4

    @property
    def scale(self) -> int:
        """How many times smaller than right the tensors for the ceilings are."""
        return 64 if self.rehearse else 8 if self.quick else 1

    def machine(self) -> Machine:
        """Where."""
        if self.device == "cpu":
            return Cpu(self.threads or torch.get_num_threads(), self.cold)
        return Rehearsal() if self.rehearse else Cuda()

    def room(self, machine: Machine) -> int:
        """Bytes for one shape."""
        if self.memory:
            return int(self.memory * 2**30)
        return min(machine.free_bytes(), MOST_ON_CPU) if machine.device == "cpu" else machine.free_bytes()


def chosen(options: Options) -> list[Shape]:
    """The shapes that the options ask for."""
    shapes = cuda_shapes(options.quick) if options.device == "cuda" else cpu_shapes(options.quick)
    sections = options.sections or {shape.section for shape in shapes}
    wanted = [shape for shape in shapes if shape.section in sections and re.search(options.pattern, str(shape))]
    is_small = options.device == "cuda" and options.rehearse
    return list(dict.fromkeys(map(shrink, wanted))) if is_small else wanted  # some are alike when they are small


def run(
    options: Options, command: str = "", tick: Tick = lambda name: None, keep: Keep = lambda found: None
) -> Results:
    """Measures until all is there or the budget is spent; what is then left out is named in `details["left_out"]`.

    Args:
        options: See there.
        command: What was typed.
        tick: Called with the name of a shape before it is measured.
        keep: Called with everything found until then after each shape, so that it can be written.

    Raises:
        ValueError: No shape is chosen.
    """
    shapes = chosen(options)
    if not shapes:
        raise ValueError(f"no shape has a section in {list(options.sections)} and a name with {options.pattern!r}")
    torch.manual_seed(options.seed)
    machine = options.machine()
    orders = dict(storage.ORDERS)
    if options.order:
        storage.ORDERS[machine.device] = options.order
    try:
        return _measure(options, machine, shapes, command, tick, keep)
    finally:
        storage.ORDERS.clear()
        storage.ORDERS.update(orders)


def _measure(options: Options, machine: Machine, shapes: list[Shape], command: str, tick: Tick, keep: Keep) -> Results:
    environment = what_it_depends_on(options.seed, machine.device) | machine.describe()
    settings = asdict(options)
    deadline = time.perf_counter() + (options.budget or BUDGETS[options.device])
    ceilings = machine.ceilings(options.scale)
    timings: list[Timing] = []
    found = assemble(command, environment, settings, ceilings, timings, options.changes)
    for number, shape in enumerate(shapes):
        if time.perf_counter() > deadline:
            found.details["left_out"] = [str(shape) for shape in shapes[number:]]
            break
        tick(str(shape))
        timings.append(measure(machine, shape, list(options.changes), options.seconds_per_shape, options.room(machine)))
        found = assemble(command, environment, settings, ceilings, timings, options.changes)
        keep(found)
    return found
