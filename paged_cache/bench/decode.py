"""`bench decode`: a decode step of a patched model with `PagedCache` against the same model with transformers' caches.

`step_ms` is the whole forward of one new token per row, with the inputs of `generate` and a prefix index; `layer_ms` the
time from the call of `cache.update` to the result of the attention, per layer. The blocks lie in random order. All caches
hold the same random tokens and take turns of up to eight steps, one after the other as `generate` makes them: a processor
that has just run somebody else's step is slower in the next. All outputs are compared.
"""

import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from .measuring import Tick, WrongAnswerError, alternate, bundle
from .models import kv_bytes_per_token
from .results import Case, Goal, Line, Results, environment
from .serving.comparing import torch_threads
from .stepping import DYNAMIC, GROWTH, PAGED, Stepper, make_steppers
from .stepping import make_model as make_model

MOST_SAMPLES = 15
EVERY = 2**31  # samples: those of steps and layers are bundled alike
WARM_UP = 3
MOST_STEPS = 8  # of a turn,
TURN = 0.1  # or as many as take so many seconds
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # see `difference`
COPIES = 4  # of K and V: paged, dynamic, static, and the one that torch.cat makes of a layer or two
GIB = 2**30
TITLE = "A decode step: PagedCache against transformers' caches"
EIGHT_LONG = {"batch_size": 8, "context": 8192}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: "layers" for two layers with next to nothing but attention, else as for `models.make_model`.
        device, dtype: Of model and caches.
        batch_sizes, contexts: All pairs of them.
        seconds: Per pair.
        threads: Of the CPU; two wait for each other on a busy machine.
        seed: Of weights and tokens.
        memory: GiB that caches may take; None for 60 % of what is free.
        compiles: On CUDA: whether a compiled model with a static cache is among the peers. It takes half a minute per case.
    """

    model: str = "28m"
    device: str = "cpu"
    dtype: str = "float32"
    batch_sizes: Sequence[int] = (1, 8, 32)
    contexts: Sequence[int] = (128, 512, 2048, 8192)
    seconds: float = 6.0
    threads: int | None = 1
    seed: int = 0
    memory: float | None = None
    compiles: bool = True

    def room(self) -> int:
        """Bytes for caches."""
        if self.memory:
            return int(self.memory * GIB)
        is_cuda = self.device.startswith("cuda")
        free = torch.cuda.mem_get_info()[0] if is_cuda else psutil.virtual_memory().available
        return int(0.6 * free)


QUICK: dict[str, Any] = {"batch_sizes": (1, 2), "contexts": (128,), "seconds": 0.1}
"""Two small cases: does it run, do the outputs agree."""
GOALS = [
    Goal("a step takes at most the time with DynamicCache", "step_ms", PAGED, DYNAMIC, at_most=1.0),
    Goal("8 x 8192: at most 0.35 of it", "step_ms", PAGED, DYNAMIC, at_most=0.35, case=EIGHT_LONG),
]


@torch.no_grad()
def run(
    settings: Settings,
    command: str = "",
    tick: Tick = lambda name: None,
    keep: Callable[[Results], object] = lambda found: None,
) -> Results:
    """A case per batch size and context; those that do not fit into memory have a note instead of times.

    Args:
        settings: See there.
        command: What was typed.
        tick: Called with the name of a case before it is measured.
        keep: Called with everything found until then after each case, so that it can be written.

    Raises:
        WrongAnswerError: Outputs with `PagedCache` differ from those with `DynamicCache`.
    """
    with torch_threads(settings.threads):
        torch.manual_seed(settings.seed)
        found = Results(
            f"decode_{settings.model.replace('/', '_')}",
            TITLE,
            command,
            environment(settings.seed, settings.device),
            asdict(settings),
            columns=["step_ms", "layer_ms"],
            compared=["step_ms", "layer_ms"],
            ours=[PAGED],
            goals=GOALS,
            details={"cases": []},
        )
        model = make_model(settings.model, settings.device, settings.dtype, settings.seed)
        for batch_size, context in itertools.product(settings.batch_sizes, settings.contexts):
            case = {"batch_size": batch_size, "context": context}
            tick(f"{batch_size} x {context}")
            lines, details = measure_case(settings, model, case)
            found.lines += lines
            found.details["cases"].append(case | details)
            keep(found)
            gc.collect()  # steppers and their caches know each other
    return found


def measure_case(settings: Settings, model: Any, case: Case) -> tuple[list[Line], dict[str, Any]]:
    """Lines, and what else is known: bytes of K and V, rounds, the worst difference to the reference."""
    batch_size, context = case["batch_size"], case["context"]
    kv_bytes = batch_size * context * kv_bytes_per_token(model)
    needed, room = COPIES * kv_bytes, settings.room()
    if needed > room:
        note = f"left out: needs {needed / GIB:.1f} GiB, {room / GIB:.1f} are there"
        return [Line(case, PAGED, {}, note)], {"kv_bytes": kv_bytes}
    race = Race(
        make_steppers(model, batch_size, context, settings.compiles), TOLERANCE[settings.dtype], model.config.vocab_size
    )
    for _ in range(WARM_UP):
        race.round()
    race.lengthen_turns()
    samples = alternate(race.watches(), settings.seconds, most_samples=EVERY)
    lines = [Line(case, name, _metrics(race.steppers[name], turns, race.turn)) for name, turns in samples.items()]
    lines += [Line(case, name, {}, note) for name, note in race.notes.items()]
    rounds = len(samples[PAGED])
    return lines, {"kv_bytes": kv_bytes, "rounds": rounds, "turn": race.turn, "worst_difference": race.worst}


class Race:
    """Steppers that take the same steps, in any order within a round; whoever has other outputs is out.

    Attributes:
        steppers: By name, those that are in.
        notes: By name, why others are out.
        worst: Largest `difference` of ours to the reference until now.
        turn: Steps that each makes before the next one's turn.
    """

    def __init__(self, steppers: list[Stepper], tolerance: float, vocab_size: int) -> None:
        self.steppers = {stepper.name: stepper for stepper in steppers}
        self.notes: dict[str, str] = {}
        self.worst, self.turn = 0.0, 1
        self._tolerance, self._vocab_size = tolerance, vocab_size
        self._outputs: dict[str, torch.Tensor] = {}
        self._num_steps = 0
        self._ids = self._new_ids()

    def watches(self) -> dict[str, Callable[[], float]]:
        """A turn each, which returns the seconds of a step."""
        return {name: lambda name=name: self._timed_turn(name) for name in self.steppers}  # type: ignore[misc]

    def lengthen_turns(self) -> None:
        """From now on `MOST_STEPS` in a row, or as many as the slowest makes in the time of a turn."""
        slowest = max(statistics.median(stepper.steps[-WARM_UP:]) for stepper in self.steppers.values())
        self.turn = max(1, min(MOST_STEPS, int(TURN / slowest)))
        self._ids = self._new_ids()
        self._make_room()

    def round(self) -> None:
        """A turn of everybody. A peer that fails or differs is left out from now on.

        Raises:
            WrongAnswerError: Ours differs.
        """
        for name in list(self.steppers):
            self._try(name)
        self._end_round()

    def _try(self, name: str) -> None:
        try:
            self._outputs[name] = self._turn(name)
            self._compare(name)
        except RuntimeError as error:  # out of memory is one of them, and so is what a compiler says
            if name in (PAGED, DYNAMIC):
                raise
            self._leave(name, error)
        except WrongAnswerError as error:
            if name == PAGED:
                raise
            self._leave(name, error)

    def _leave(self, name: str, error: Exception) -> None:
        self.notes[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._outputs.pop(name, None)
        del self.steppers[name]

    def _turn(self, name: str) -> torch.Tensor:
        return torch.stack([self.steppers[name].step(ids) for ids in self._ids])

    def _timed_turn(self, name: str) -> float:
        self._outputs[name] = self._turn(name)
        if len(self._outputs) == len(self.steppers):
            self._end_round()
        return statistics.fmean(self.steppers[name].steps[-self.turn :])

    def _end_round(self) -> None:
        for name in self._outputs:
            self._compare(name)
        self._outputs, self._ids = {}, self._new_ids()
        self._num_steps += self.turn
        self._make_room()

    def _make_room(self) -> None:
        if self._num_steps + self.turn > GROWTH:
            for stepper in self.steppers.values():
                stepper.crop(self._num_steps)
            self._num_steps = 0

    def _compare(self, name: str) -> None:
        found = difference(self._outputs[name], self._outputs[DYNAMIC])
        if name == PAGED:
            self.worst = max(self.worst, found)
        if not found < self._tolerance:
            raise WrongAnswerError(f"outputs with {name} differ by {found:.2g} from those with {DYNAMIC}")

    def _new_ids(self) -> torch.Tensor:
        stepper = next(iter(self.steppers.values()))
        return torch.randint(self._vocab_size, (self.turn, stepper.batch_size, 1), device=stepper.device)


def difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the expected output's root mean square: the largest one in float32, with less precision the root mean square."""
    apart, usual = (output.float() - expected.float()).abs(), expected.float().square().mean().sqrt()
    largest = apart.max() if expected.dtype == torch.float32 else apart.square().mean().sqrt()
    return (largest / usual).item()


def _metrics(stepper: Stepper, turns: list[float], turn: int) -> dict[str, list[float]]:
    """Milliseconds of a step in each turn; those of layers belong to the same steps."""
    found = {"step_ms": turns}
    if layers := stepper.layers[-len(turns) * turn :]:
        found["layer_ms"] = [statistics.fmean(layers[i : i + turn]) for i in range(0, len(layers), turn)]
    return {name: [float(f"{1e3 * x:.4g}") for x in bundle(seconds, MOST_SAMPLES)] for name, seconds in found.items()}
