"""What the kernels have to reach, per line, and whether they do."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .. import results
from .candidates import PAGED, READ
from .machines import Ceilings
from .shapes import Shape
from .timing import Timing, short

MIB, GIB = 2**20, 2**30
Lines = dict[Shape, Timing]


@dataclass(frozen=True)
class Goal:
    """A number for some shapes, which must be at least (or at most) something.

    Attributes:
        metric: Name of the number; only shapes that the goal speaks of have it.
        value: The number of a shape, None for those that the goal does not speak of.
        must: What is asked of it.
        stretch: What would be better still.
        at_least: Whether more is better.
    """

    name: str
    metric: str
    value: Callable[[Timing, Lines, Ceilings], float | None]
    must: float
    stretch: float | None = None
    at_least: bool = True

    def limits(self) -> list[results.Goal]:
        """What has to be reached, and what would be better still."""
        limits: list[tuple[float | None, bool]] = [(self.must, False), (self.stretch, True)]
        return [
            results.Goal(
                self.name,
                self.metric,
                PAGED,
                at_least=limit if self.at_least else None,
                at_most=None if self.at_least else limit,
                is_stretch=is_stretch,
            )
            for limit, is_stretch in limits
            if limit is not None
        ]


def judge(kind: str, timings: list[Timing], ceilings: Ceilings) -> dict[Goal, dict[Shape, float]]:
    """Every goal of the device that some shape speaks of, and the shapes' numbers."""
    lines = {timing.shape: timing for timing in timings if timing.times}
    verdicts = {}
    for goal in GOALS[kind]:
        found = {shape: goal.value(timing, lines, ceilings) for shape, timing in lines.items()}
        if values := {shape: value for shape, value in found.items() if value is not None}:
            verdicts[goal] = values
    return verdicts


def add_goals(found: results.Results, kind: str, timings: list[Timing], ceilings: Ceilings) -> None:
    """Puts the numbers on our lines, and the goals beside them."""
    cases = {timing.shape: timing.case for timing in timings}
    for goal, values in judge(kind, timings, ceilings).items():
        found.goals += goal.limits()
        for shape, value in values.items():
            line = found.line(cases[shape], PAGED)
            if line is not None:
                line.metrics[goal.metric] = short([value])


def _peer(name: str, section: str, sizes: tuple[int, int] | None = None) -> Callable[..., float | None]:
    """Median ratio to a peer, in lines of one section and, if given, one batch and context; caches of 8 bits have no peer."""

    def value(timing: Timing, *_: Any) -> float | None:
        shape = timing.shape
        wanted = shape.section == section and sizes in (None, (shape.batch, shape.context)) and not shape.kv_dtype
        return timing.ratios[name].median if wanted and name in timing.ratios else None

    return value


def _copy(low: float, high: float) -> Callable[..., float | None]:
    """Bandwidth over that of a copy, for bfloat16 decode of so many bytes."""

    def value(timing: Timing, _: Lines, ceilings: Ceilings) -> float | None:
        fits = timing.shape.section == "decode" and low <= timing.shape.kv_bytes < high
        return timing.bandwidth / ceilings.copy if fits else None

    return value


def _beyond_bytes(timing: Timing, _: Lines, ceilings: Ceilings) -> float | None:
    """Microseconds more than the copy's bandwidth asks for."""
    fits = timing.shape.section in ("decode", "window", "verify") and 32 * MIB <= timing.shape.kv_bytes < 160 * MIB
    return timing.times[PAGED] - timing.shape.kv_bytes / ceilings.copy / 1e3 if fits else None


def _tiny(timing: Timing, *_: Any) -> float | None:
    fits = timing.shape.section == "decode" and timing.shape.kv_bytes <= 4 * MIB
    return timing.times[PAGED] if fits else None


def _quantised(kv_dtype: str) -> Callable[..., float | None]:
    """How much faster than bfloat16, where that holds at least a GiB."""

    def value(timing: Timing, lines: Lines, _: Ceilings) -> float | None:
        plain = lines.get(replace(timing.shape, section="decode", kv_dtype=None))
        fits = timing.shape.kv_dtype == kv_dtype and plain is not None and plain.shape.kv_bytes >= GIB
        return plain.times[PAGED] / timing.times[PAGED] if fits and plain else None

    return value


def _ragged(timing: Timing, _: Lines, ceilings: Ceilings) -> float | None:
    return ceilings.copy / timing.bandwidth if timing.shape.section == "ragged" else None


def _teraflops(section: str, context: int) -> Callable[..., float | None]:
    def value(timing: Timing, *_: Any) -> float | None:
        fits = timing.shape.section == section and timing.shape.context >= context
        return timing.gflops / 1e3 if fits else None

    return value


def _window(timing: Timing, lines: Lines, _: Ceilings) -> float | None:
    shape = timing.shape
    narrow = lines.get(replace(shape, context=shape.window, window=None)) if shape.window else None
    return timing.times[PAGED] / narrow.times[PAGED] if narrow else None


def _over_parts(timing: Timing, lines: Lines, _: Ceilings) -> float | None:
    """Time of a call with a prompt and decoding rows over that of two calls."""
    shape = timing.shape
    if shape.section != "step" or shape.first is None:
        return None
    context, q_len = shape.first
    parts = (
        replace(shape, batch=shape.batch - 1, first=None),
        replace(shape, batch=1, context=context, q_len=q_len, first=None),
    )
    times = [lines[part].times[PAGED] for part in parts if part in lines]
    return timing.times[PAGED] / sum(times) if len(times) == len(parts) else None


K = 1024
GOALS = {
    "cpu": [
        Goal("decode, speed over SDPA on dense K/V", "decode_over_sdpa", _peer("sdpa", "decode"), 0.9),
        Goal("decode 8 x 8192, speed over DynamicCache", "over_dynamic", _peer("dynamic", "decode", (8, 8 * K)), 3),
        Goal("decode from 64 MiB on, share of a plain read's bandwidth", "read_share", _peer(READ, "decode"), 0.7),
        Goal("step, speed over SDPA on dense K/V", "step_over_sdpa", _peer("sdpa", "step"), 0.9),
        Goal("step, time over that of its parts", "over_parts", _over_parts, 1.1, at_least=False),
    ],
    "cuda": [
        Goal("decode bf16 from 1 GiB on, share of the copy bandwidth", "copy_share", _copy(GIB, 2**60), 0.85, 0.92),
        Goal("the same, 256 MiB", "copy_share_256_mib", _copy(250 * MIB, 300 * MIB), 0.75, 0.85),
        Goal("32 to 128 MiB, us beyond bytes / copy bandwidth", "beyond_copy_us", _beyond_bytes, 8, 5, at_least=False),
        Goal("decode of 4 MiB, us", "tiny_us", _tiny, 8, 5, at_least=False),
        Goal("float8_e4m3fn, speed over bf16 of 1 GiB", "float8_over_bf16", _quantised("float8_e4m3fn"), 1.6, 1.85),
        Goal("int8, speed over bf16 of 1 GiB and more", "int8_over_bf16", _quantised("int8"), 1.45, 1.85),
        Goal("ragged batch, time over bytes / copy bandwidth", "over_copy", _ragged, 1.3, 1.15, at_least=False),
        Goal("prefill from 8k on, TFLOP/s", "prefill_tflops", _teraflops("prefill", 8 * K), 400, 480),
        Goal("chunk of 512 on 32k, TFLOP/s", "chunk_tflops", _teraflops("chunk", 32 * K), 300, 400),
        Goal("window 4k of 32k, time over that of 4k", "over_window", _window, 1.1, at_least=False),
    ],
}
