"""Figures in the performance guide are those of the committed results."""

import functools
import re
from statistics import median

import pytest

from paged_cache.bench.results import Results
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "performance.md"


@functools.cache
def results(name: str) -> Results:
    """One committed file."""
    return Results.load(ROOT / "benchmarks" / "results" / f"{name}.json")


def samples(name: str, candidate: str, metric: str, **case: object) -> list[float]:
    """All rounds of one candidate, in the first case that has these values."""
    file = results(name)
    first = next(found for found in file.cases() if case.items() <= found.items())
    line = file.line(first, candidate)
    assert line is not None
    return line.metrics[metric]


def value(name: str, candidate: str, metric: str, **case: object) -> float:
    """Their median."""
    return median(samples(name, candidate, metric, **case))


def faster(name: str, ours: str, peer: str, **case: object) -> float:
    """Their time over ours, round by round."""
    pairs = zip(samples(name, peer, "elapsed_time", **case), samples(name, ours, "elapsed_time", **case), strict=True)
    return median(theirs / mine for theirs, mine in pairs)


def more_adapters() -> float:
    """Eight adapters over one, round by round."""
    one, eight = (samples("lora", "ours", "elapsed_time", adapters=n) for n in (1, 8))
    return median(many / single for single, many in zip(one, eight, strict=True))


def of_trace(candidate: str, metric: str) -> float:
    """On 192 requests."""
    return value("throughput_192", candidate, metric)


def soak(metric: str) -> float:
    """Of the run that looks for what goes wrong."""
    return value("batching_soak", "sjf", metric)


def first_step(name: str) -> float:
    """Share of bookkeeping in a step of 32 rows."""
    return value(name, "sjf", "bookkeeping_percent")


def in_8_bits(candidate: str, metric: str) -> float:
    """What a pool of one dtype costs."""
    return value("quantized_kv", candidate, metric)


def kernel(dtype: str) -> float:
    """Microseconds of attention over a cache of this dtype."""
    case = {"section": "decode", "shape": f"decode {dtype} 8/4x64 b16 8 x 2048"}
    return value("kernels_cpu", "paged", "call_us", **case)


def of_scheduling(name: str, metric: str, section: str = "slots", load: float = 1.0) -> float:
    """A policy's number in the simulation; ratios are over first come, first served."""
    return value("scheduling", name, metric, section=section, load=load)


def policy(name: str) -> list[float]:
    """At load 1, over first come, first served."""
    metrics = ("mean_e2el", "p99_e2el", "mean_e2el_per_token", "max_wait")
    return [of_scheduling(name, f"{metric}_ratio") for metric in metrics]


# Words on the page, and what stands in them.
FIGURES = [
    ("{:.1f} % with blocks of 16", lambda: [value("memory", "PagedCache", "unused_percent")]),
    ("padded batches of 8 waste {:.0f} %", lambda: [value("memory", "DynamicCache, batches of 8", "unused_percent")]),
    (
        "a TPOT of {:.0f} ms and {:.0f} tokens/s, the batcher {:.0f} ms and {:.0f} tokens/s",
        lambda: [of_trace(who, metric) for who in ("loop", "sjf") for metric in ("mean_tpot_ms", "output_throughput")],
    ),
    ("{:.1f} instead of {:.1f} s", lambda: [of_trace(who, "mean_ttft_ms") / 1000 for who in ("sjf", "loop")]),
    ("64 short ones are {:.1f} times", lambda: [faster("throughput", "sjf", "loop", shared_prefix_len=0)]),
    ("192 are {:.1f} times", lambda: [faster("throughput_192", "sjf", "loop")]),
    ("in a batch of 32 cost {:.2f} times", lambda: [more_adapters()]),
    ("8 adapters are {:.1f} times as fast", lambda: [faster("lora", "ours", "mixed", adapters=8)]),
    (
        "{:.2f} times as fast when six",
        lambda: [faster("offload", "with host memory", "without", trace="conversations")],
    ),
    ("no gain for preemptions, {:.2f}", lambda: [faster("offload", "with host memory", "without", trace="preempted")]),
    ("28M parameters bookkeeping is {:.1f} %", lambda: [first_step("batching_profile_28m")]),
    ("with 2.3M {:.1f} %", lambda: [first_step("batching_profile")]),
    (
        "{:.2f} of the bytes of 16 bits",
        lambda: [in_8_bits("int8", "bytes_per_token") / in_8_bits("bfloat16", "bytes_per_token")],
    ),
    ("a KL of {:.1e} to float32", lambda: [in_8_bits("int8", "divergence")]),
    ("bfloat16 has {:.1e}", lambda: [in_8_bits("bfloat16", "divergence")]),
    ('| `"sjf"`, aged | {:.2f} | {:.2f} | {:.2f} | {:.2f} |', lambda: policy("sjf")),
    ('| `"hrrn"` | {:.2f} | {:.2f} | {:.2f} | {:.2f} |', lambda: policy("hrrn")),
    ('| `"sjf-no-aging"` | {:.2f} | {:.2f} | {:.2f} | {:.2f} |', lambda: policy("sjf-no-aging")),
    ("(8 x 2048: {:.0f} and {:.0f} us", lambda: [kernel("int8"), kernel("bfloat16")]),
    ("at load 1.1, it was {:.1f} per hundred", lambda: [100 * of_scheduling("sjf", "preemptions", "memory", 1.1)]),
    ("At load 0.5 the mean latency is {:.2f}", lambda: [of_scheduling("sjf", "mean_e2el_ratio", load=0.5)]),
    ("On {:,.0f} steps", lambda: [soak("num_steps")]),
    ("saw {:,.0f} preemptions", lambda: [soak("num_preemptions")]),
]


@pytest.mark.parametrize(("words", "values"), FIGURES, ids=[words for words, _ in FIGURES])
def test_figures_are_those_of_the_results(words, values) -> None:
    """Each sentence has the numbers of its file, rounded as it rounds."""
    text = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    numbers = [number * (1 + 1e-9) for number in values()]  # halves go up
    expected = re.sub(r"e([-+])0(\d)", r"e\1\2", words.format(*numbers))

    assert expected in text, f"docs/performance.md has to say: {expected}"


def test_throughput_is_within_the_bound() -> None:
    """`scheduling.json`: no policy of the table changes the throughput by more than the page says."""
    found = re.search(r"Throughput is the same within (\d+) %", PAGE.read_text(encoding="utf-8"))
    ratios = [of_scheduling(name, "output_throughput_ratio") for name in ("sjf", "hrrn", "sjf-no-aging")]

    assert found
    assert all(abs(ratio - 1) < int(found[1]) / 100 for ratio in ratios), ratios


def decode_ratio(name: str, metric: str, batch: int, context: int) -> float | None:
    """DynamicCache's time over ours, round by round; None for what did not fit into memory."""
    case = {"batch_size": batch, "context": context}
    if not results(name).line(case, "paged").metrics:
        return None
    pairs = zip(*(samples(name, who, metric, **case) for who in ("dynamic", "paged")), strict=True)
    return median(theirs / ours for theirs, ours in pairs)


def test_the_table_of_decode_steps() -> None:
    """Each cell is that of the file and the metric that the page names above the table."""
    text = PAGE.read_text(encoding="utf-8").partition("## What it does to one step")[2]
    source = re.search(r"`results/(decode_\w+)\.json`, `(\w+)`, medians\):\n\n\| \|(.*)\|\n[|-]+\n((?:\|.*\n)+)", text)
    assert source
    contexts = [int(cell.replace(",", "")) for cell in source[3].split("|")]
    for row in source[4].splitlines():
        batch, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        ratios = [decode_ratio(source[1], source[2], int(batch), context) for context in contexts]

        digits = ["-" if ratio is None else f"{ratio:.{2 if ratio < 9.995 else 1}f}" for ratio in ratios]
        assert cells == digits, f"{source[1]}.json, batch {batch}"
    assert len(source[4].splitlines()) == 3
