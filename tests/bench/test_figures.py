"""Figures of the README are those of the committed JSON files, or what `paged-cache demo` prints.

`FIGURES` has an entry per sentence or row: a regular expression, and for each of its groups a function that gives the
number. A number agrees if it is the measured one, rounded to the digits that the README has. Every decimal number and
every number with a unit, outside of `NOT_MEASURED`, must be in a group or be part of what an entry matches.
"""

import functools
import re
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paged_cache.bench.results import Results
from paged_cache.cli import app

pytestmark = pytest.mark.slow  # says nothing about the installed transformers

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_MEASURED = {
    "Install": "versions",
    "What you can do with it": "values of arguments",
    "Develop": "how long commands take",
}
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+|(?:\.\d+)? ?(?:%|(?:x(?! \d)|times|s|ms|us|[KMG]iB|GB/s|tokens/s)\b))")


@functools.cache
def results(name):
    """A committed file."""
    return Results.load(ROOT / "benchmarks" / "results" / f"{name}.json")


def find(name, case):
    """The first case with all of these values."""
    return next(one for one in results(name).cases() if case.items() <= one.items())


def value(name, candidate, metric, scale=1.0, **case):
    """The median of a metric."""
    return lambda: scale * results(name).line(find(name, case), candidate).spread(metric).median


def ratio(name, metric, ours, peer, part="median", is_inverse=False, **case):
    """Ours over theirs, or the inverse: `times as fast`."""

    def number():
        spread = results(name).ratio(find(name, case), metric, ours, peer)
        opposite = {"min": "max", "max": "min", "median": "median"}
        return 1 / getattr(spread, opposite[part]) if is_inverse else getattr(spread, part)

    return number


@functools.cache
def demo():
    """What the demo prints."""
    with tempfile.TemporaryDirectory() as folder:
        shown = CliRunner().invoke(app, ["demo", "--output", folder], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    return shown.output


def printed(pattern):
    """The number that the demo prints, which is the group of a pattern."""

    def number():
        found = re.search(pattern, demo())
        assert found, f"{pattern} is not in what the demo prints:\n{demo()}"
        return float(found[1])

    return number


def faster(file, peer, part="median", ours="paged", **case):
    """How many times as fast."""
    return ratio(file, "elapsed_time", ours, peer, part, is_inverse=True, **case)


def unused(candidate):
    """Percent of the slots."""
    return value("memory", candidate, "unused_percent", requests=256)


def served(candidate):
    """Seconds, tokens per second, and seconds to the first token."""
    times = [value("throughput_192", candidate, name) for name in ("elapsed_time", "output_throughput")]
    return [*times, value("throughput_192", candidate, "mean_ttft_ms", 1e-3)]


def steps(metric):
    """What a decoding step takes of the time with `DynamicCache`, by batch and context."""
    shapes = ((1, 128), (1, 2048), (1, 8192), (8, 512), (8, 8192))
    return [ratio("decode_28m", metric, "paged", "dynamic", batch_size=batch, context=n) for batch, n in shapes]


N = r"(\d[\d,]*(?:\.\d+)?)"
ROW = rf"{N} MiB \| {N} MiB \| {N} % \|"
CELLS = rf"{N} \| {N} \| {N} \| {N} \| {N} \|"
SERVED = rf"{N} \| {N} \| {N} s \|"
RANGE = f"{N} to {N}"


def row(name):
    """Reserved, used and wasted, as the demo prints them."""
    cells = r"\D*?(?:\(\d+\)\D*?)?"
    number = r"\d+(?:\.\d+)?"
    parts = [r"({0}) MiB", r"{0} MiB\D+({0}) MiB", r"{0} MiB\D+{0} MiB\D+{0} [KM]iB\s+({0}) ?%"]
    return [printed(name + cells + part.format(number)) for part in parts]


FIGURES = [
    (rf"\| `StaticCache\(256\)` \| {ROW}", row(r"StaticCache")),
    (rf"\| `DynamicCache`, padded \| {ROW}", row(r"DynamicCache, padded")),
    (rf"\| `PagedCache` \| {ROW}", row(r"PagedCache")),
    (
        rf"\| {N} % \| {N} % / {N} % \| {N} % / {N} % \|",
        [unused("PagedCache")]
        + [unused(f"{kind}, batches of {size}") for kind in ("DynamicCache", "StaticCache") for size in (8, 32)],
    ),
    (rf"\| `ContinuousBatcher\(.*?\)` \| {SERVED}", served("sjf")),
    (rf"\| the same with `prepack_weights=True` \| {SERVED}", served("prepacked")),
    (rf"\| `model.generate`, padded batches of 8 \| {SERVED}", served("padded")),
    (rf"\| transformers' continuous batching \| {SERVED}", served("generate_batch")),
    (rf"\| `model.generate`, one after the other \| {SERVED}", served("loop")),
    (
        rf"is {RANGE} times as fast as `batch_size=1`, {RANGE} as 8, and {RANGE} as 32",
        [faster("pipeline_28m", f"batch_size={size}", part) for size in (1, 8, 32) for part in ("min", "max")],
    ),
    (
        rf"With 8 LoRA adapters .*?: {N} times the time of one adapter, {N} times as fast as peft's",
        [
            ratio("lora", "elapsed_time", "ours", "ours, one adapter", adapters=8),
            faster("lora", "mixed", ours="ours", adapters=8),
        ],
    ),
    (
        rf"{N} times `generate` for the first 64, {N} with prepacked weights",
        [ratio("throughput", "output_throughput", name, "loop", shared_prefix_len=0) for name in ("sjf", "prepacked")],
    ),
    (rf"\| the whole step \| {CELLS}", steps("step_ms")),
    (rf"\| cache and attention of a layer \| {CELLS}", steps("layer_ms")),
    (
        rf"vLLM's CPU build .*? {N} times its time, with\s+prepacked weights {N} times",
        [ratio("throughput_vllm", "elapsed_time", name, "vllm") for name in ("sjf", "prepacked")],
    ),
    (rf"own it is {N} and {N} times", [ratio("serve", "duration", name, "vllm") for name in ("sjf", "prepacked")]),
    (r"transformers 5\.17 to 5\.23", []),
]


def decimals(text):
    """Digits behind the point."""
    return len(text.partition(".")[2])


def agrees(text, number):
    """Whether a number is what stands there, rounded; half a digit either way, as rounding is not always to even."""
    step = 10 ** -decimals(text)
    return abs(float(text.replace(",", "")) - number) <= (0.5 + 1e-6) * step


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("pattern", "numbers"), FIGURES, ids=[re.sub(r"\W+", " ", entry[0])[:50] for entry in FIGURES])
def test_figures_are_those_that_were_measured(pattern, numbers):
    """What the README says is what the files have; an entry without its sentence has to go."""
    found = re.search(pattern, README)
    if not numbers and not found:
        return
    assert found, f"The README has nothing like {pattern}."

    measured = [number() for number in numbers]
    wrong = [(text, number) for text, number in zip(found.groups(), measured, strict=True) if not agrees(text, number)]
    assert not wrong, f"The README and what was measured: {wrong}"


def sections(text):
    """Title and text, without code; what comes first has no title."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    parts = re.split(r"^## (.*)$", text, flags=re.M)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def uncovered(text):
    """Numbers that no entry speaks of."""
    left = [part for title, part in sections(text).items() if title not in NOT_MEASURED]
    for pattern, _ in FIGURES:
        left = [re.sub(pattern, "", part) for part in left]
    return [found[0] for part in left for found in NUMBER.finditer(part)]


def test_no_figure_is_without_a_source():
    """Each number with a decimal point or a unit is in an entry of `FIGURES`, or in a section that measures nothing."""
    assert uncovered(README) == []


def test_new_figures_are_noticed():
    """Whatever unit they have; shapes, code and exempt sections are none."""
    text = "It is 7.5 so, 3 times, 12 % and 1,024 MiB, 4 ms, 2 x faster; 1 x 512 and 8 beams.\n```\n9 %\n```\n## Install\n5 s"

    assert uncovered(text) == ["7.5", "3 times", "12 %", "1,024 MiB", "4 ms", "2 x"]


def test_rounding():
    """The last digit may be half a step off and no more."""
    assert all(agrees(text, 14.16) for text in ("14.2", "14", "14.16"))
    assert not any(agrees(text, 14.16) for text in ("14.1", "14.3", "15", "14.17"))
