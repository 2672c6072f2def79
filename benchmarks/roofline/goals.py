"""What the kernels have to reach, per line, and whether they do."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .candidates import PAGED, READ
from .machines import Ceilings
from .measuring import Result
from .shapes import Shape

MIB, GIB = 2**20, 2**30
Lines = dict[Shape, Result]


@dataclass(frozen=True)
class Goal:
    """A number for some lines, which must be at least (or at most) something.

    Attributes:
        value: The number of a line, None for lines that the goal does not speak of.
        must: What is asked of it.
        stretch: What would be better still.
        at_least: Whether more is better.
    """

    name: str
    value: Callable[[Result, Lines, Ceilings], float | None]
    must: float
    stretch: float | None = None
    at_least: bool = True

    def is_met(self, value: float, limit: float) -> bool:
        """Whether a value keeps a limit."""
        return value >= limit if self.at_least else value <= limit


@dataclass(frozen=True)
class Verdict:
    """A goal over all its lines; `values` by name of the line."""

    goal: str
    must: float
    stretch: float | None
    num_met: int
    num_stretch: int
    worst: str
    values: dict[str, float]

    def __str__(self) -> str:
        met = "met" if self.num_met == len(self.values) else "NOT MET"
        stretch = "" if self.stretch is None else f", {self.num_stretch} reach {self.stretch:g}"
        return (
            f"{met:7}  {self.goal}: {self.num_met} of {len(self.values)} lines{stretch}; "
            f"worst {self.values[self.worst]:.3g} in '{self.worst}'"
        )

    def to_json(self) -> dict[str, Any]:
        """For the results."""
        return asdict(self)


def judge(device: str, results: list[Result], ceilings: Ceilings) -> list[Verdict]:
    """Every goal of the device that some line speaks of."""
    lines = {result.shape: result for result in results if result.times}
    verdicts = []
    for goal in GOALS[device]:
        found = {str(shape): goal.value(result, lines, ceilings) for shape, result in lines.items()}
        values = {line: value for line, value in found.items() if value is not None}
        if values:
            met = sum(goal.is_met(value, goal.must) for value in values.values())
            better = sum(goal.is_met(value, goal.stretch) for value in values.values()) if goal.stretch else 0
            worst = (min if goal.at_least else max)(values, key=lambda line: values[line])
            verdicts.append(Verdict(goal.name, goal.must, goal.stretch, met, better, worst, values))
    return verdicts


def _peer(name: str, section: str, sizes: tuple[int, int] | None = None) -> Callable[..., float | None]:
    """Median ratio to a peer, in lines of one section and, if given, one batch and context; caches of 8 bits have no peer."""

    def value(result: Result, *_: Any) -> float | None:
        shape = result.shape
        wanted = shape.section == section and sizes in (None, (shape.batch, shape.context)) and not shape.kv_dtype
        return result.ratios[name].median if wanted and name in result.ratios else None

    return value


def _share_of_copy(low: float, high: float) -> Callable[..., float | None]:
    """Bandwidth over that of a copy, for bfloat16 decode of so many bytes."""

    def value(result: Result, _: Lines, ceilings: Ceilings) -> float | None:
        fits = result.shape.section == "decode" and low <= result.kv_bytes < high
        return result.bandwidth / ceilings.copy if fits else None

    return value


def _beyond_bytes(result: Result, _: Lines, ceilings: Ceilings) -> float | None:
    """Microseconds more than the copy's bandwidth asks for."""
    fits = result.shape.section in ("decode", "window", "verify") and 32 * MIB <= result.kv_bytes < 160 * MIB
    return result.times[PAGED].median - result.kv_bytes / ceilings.copy / 1e3 if fits else None


def _tiny(result: Result, *_: Any) -> float | None:
    fits = result.shape.section == "decode" and result.kv_bytes <= 4 * MIB
    return result.times[PAGED].median if fits else None


def _quantised(kv_dtype: str) -> Callable[..., float | None]:
    """How much faster than bfloat16, where that holds at least a GiB."""

    def value(result: Result, lines: Lines, _: Ceilings) -> float | None:
        plain = lines.get(replace(result.shape, section="decode", kv_dtype=None))
        fits = result.shape.kv_dtype == kv_dtype and plain is not None and plain.kv_bytes >= GIB
        return plain.times[PAGED].median / result.times[PAGED].median if fits and plain else None

    return value


def _ragged(result: Result, _: Lines, ceilings: Ceilings) -> float | None:
    return ceilings.copy / result.bandwidth if result.shape.section == "ragged" else None


def _teraflops(section: str, context: int) -> Callable[..., float | None]:
    def value(result: Result, *_: Any) -> float | None:
        fits = result.shape.section == section and result.shape.context >= context
        return result.gflops / 1e3 if fits else None

    return value


def _window(result: Result, lines: Lines, _: Ceilings) -> float | None:
    shape = result.shape
    short = lines.get(replace(shape, context=shape.window, window=None)) if shape.window else None
    return result.times[PAGED].median / short.times[PAGED].median if short else None


def _over_parts(result: Result, lines: Lines, _: Ceilings) -> float | None:
    """Time of a call with a prompt and decoding rows over that of two calls."""
    shape = result.shape
    if shape.section != "step" or shape.first is None:
        return None
    context, q_len = shape.first
    parts = (
        replace(shape, batch=shape.batch - 1, first=None),
        replace(shape, batch=1, context=context, q_len=q_len, first=None),
    )
    times = [lines[part].times[PAGED].median for part in parts if part in lines]
    return result.times[PAGED].median / sum(times) if len(times) == len(parts) else None


K = 1024
GOALS = {
    "cpu": [
        Goal("decode, speed over SDPA on dense K/V, at least 0.9", _peer("sdpa", "decode"), 0.9),
        Goal("decode 8 x 8192, speed over DynamicCache, at least 3", _peer("dynamic", "decode", (8, 8 * K)), 3),
        Goal("decode from 64 MiB on, share of the bandwidth of a plain read, at least 0.7", _peer(READ, "decode"), 0.7),
        Goal("step, speed over SDPA on dense K/V, at least 0.9", _peer("sdpa", "step"), 0.9),
        Goal("step, time over that of its parts, at most 1.1", _over_parts, 1.1, at_least=False),
    ],
    "cuda": [
        Goal("decode bf16 from 1 GiB on, share of the copy bandwidth", _share_of_copy(GIB, 2**60), 0.85, 0.92),
        Goal("decode bf16 of 256 MiB, share of the copy bandwidth", _share_of_copy(250 * MIB, 300 * MIB), 0.75, 0.85),
        Goal("32 to 128 MiB, us beyond bytes / copy bandwidth, at most", _beyond_bytes, 8, 5, at_least=False),
        Goal("decode of 4 MiB, us, at most", _tiny, 8, 5, at_least=False),
        Goal("float8_e4m3fn against bf16 of 1 GiB and more, speed", _quantised("float8_e4m3fn"), 1.6, 1.85),
        Goal("int8 against bf16 of 1 GiB and more, speed", _quantised("int8"), 1.45, 1.85),
        Goal("ragged batch, time over bytes / copy bandwidth, at most", _ragged, 1.3, 1.15, at_least=False),
        Goal("prefill from 8k on, TFLOP/s", _teraflops("prefill", 8 * K), 400, 480),
        Goal("chunk of 512 on 32k, TFLOP/s", _teraflops("chunk", 32 * K), 300, 400),
        Goal("window 4k of 32k, time over that of 4k, at most", _window, 1.1, at_least=False),
    ],
}
