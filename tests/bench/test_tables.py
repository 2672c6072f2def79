"""What people read: units and digits, tables that fit, verdicts in words, the environment and a warning."""

import io

import pytest
from rich.console import Console

from paged_cache.bench.metrics import Metric, digits, ratio_text
from paged_cache.bench.results import Goal, Line, Results, Spread, Verdict
from paged_cache.bench.tables import markdown, show, value_text

pytestmark = pytest.mark.slow  # says nothing about the installed transformers

COLUMNS = [
    "elapsed_time",
    "tokens_per_second",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "kv_bytes",
    "unused_percent",
]


def make(cases, load=0.1):
    """Four candidates, one of which is not installed."""
    lines = []
    for case in cases:
        for name, factor in (("generate", 6.0), ("ours", 2.0)):
            samples = [factor, 1.1 * factor, 0.9 * factor]
            lines.append(Line(case, name, {metric: [1000 * x for x in samples] for metric in COLUMNS}))
        lines.append(Line(case, "vllm", {}, "not installed"))
    goals = [
        Goal("half the time", "elapsed_time", "ours", "generate", at_most=0.5),
        Goal("a tenth of it", "elapsed_time", "ours", "generate", at_most=0.1, is_stretch=True),
        Goal("soon", "mean_ttft_ms", "ours", at_most=1000),
    ]
    environment = {
        "device": "cpu",
        "threads": 2,
        "load": load,
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "seed": 5,
    }
    compared = ["elapsed_time", "kv_bytes"]
    return Results("x", "A title", "c", environment, {}, COLUMNS, compared, ["ours"], lines, goals)


def printed(results, width):
    """As in a terminal."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(results, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "unit", "label"),
    [
        ("mean_ttft_ms", "ms", "mean TTFT, ms"),
        ("elapsed_time", "s", "elapsed time, s"),
        ("step_us", "us", "step, us"),
        ("total_token_throughput", "/s", "tokens/s"),
        ("kv_bytes", "B", "KV"),
        ("unused_percent", "%", "unused"),
        ("reserved_slots", "slots", "reserved slots"),
        ("num_preemptions", "", "num preemptions"),
    ],
)
def test_names_say_the_unit(name, unit, label):
    """The suffix, or vLLM's name, is the unit."""
    assert (Metric(name).unit, Metric(name).label) == (unit, label)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (0.00012, "1.20e-04"), (0.0123, "0.0123"), (1.2345, "1.23"), (12.345, "12.3"), (123.4, "123"),
     (1234.5, "1234"), (12345.6, "12,346"), (7.0, "7"), (float("inf"), "inf")],
)  # fmt: skip
def test_digits(number, text):
    """Three that count, and no more."""
    assert digits(number) == text


def test_spreads_have_one_unit():
    """Least and most are in the unit of the median, and left out where nothing varies."""
    assert Metric("kv_bytes").spread(Spread(2**30, 2**29, 2**31)) == ("1 GiB", "[0.500, 2]")
    assert Metric("kv_bytes").spread(Spread(2048, 2048, 2048)) == ("2 KiB", "")
    assert Metric("kv_bytes").number(0) == "0 B"
    assert Metric("unused_percent").spread(Spread(2.5, 2.25, 3.0)) == ("2.50 %", "[2.25, 3]")
    assert ratio_text(Spread(0.31, 0.3, 0.33)) == "0.31 [0.30, 0.33]"


@pytest.mark.parametrize(
    ("metric", "ratio", "text"),
    [
        ("elapsed_time", 0.31, "3.2 x faster"),
        ("elapsed_time", 1.25, "1.25 x slower"),
        ("request_throughput", 1.25, "1.25 x faster"),
        ("request_throughput", 0.05, "20 x slower"),
        ("kv_bytes", 0.5, "2.0 x smaller"),
        ("step_us", 1.004, "the same"),
        ("num_preemptions", 0.5, ""),
        ("elapsed_time", 0.0, ""),
    ],
)
def test_ratios_in_words(metric, ratio, text):
    """Less time is faster, and so is more throughput; counts are neither."""
    assert Metric(metric).words(ratio) == text


def test_ratios_around_one_are_no_difference():
    """Words hold for all rounds: where some were faster and some slower, there is no clear difference."""
    metric = Metric("elapsed_time")

    assert metric.verdict(Spread(0.9, 0.8, 1.1)) == metric.verdict(Spread(1.1, 1.0, 1.2)) == "no clear difference"
    assert metric.verdict(Spread(0.9, 0.8, 0.95)) == "1.11 x faster"
    assert metric.verdict(Spread(1.0, 1.0, 1.0)) == "the same"
    assert Metric("num_preemptions").verdict(Spread(1.0, 0.5, 2.0)) == ""


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("num_cases", [1, 5])
def test_tables_fit_and_have_everything(width, num_cases):
    """At any width nothing is cut: all columns, samples, ratios, the note, and what numbers depend on."""
    text = printed(make([{"batch": 2**i, "dtype": "fp32"} for i in range(num_cases)]), width)

    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = " ".join(text.split())
    for expected in (
        "A title",
        "mean TTFT, ms",
        "unused",
        "[1800, 2200]",
        "0.33",
        "3.0 x faster",
        "3.0 x smaller",
        "seed 5",
    ):
        assert expected in words
    assert ("vllm: not installed (in 5 cases)" if num_cases == 5 else "vllm: not installed") in words
    assert "dtype fp32" in words


def test_goals_in_words():
    """Missing a stretch goal is no failure; values have their unit, and the case in which they are worst."""
    words = " ".join(printed(make([{"batch": 1}]), 140).split())

    assert "met half the time: 0.33 at batch 1, wanted at most 0.50" in words
    assert "missed a tenth of it (stretch): 0.33 at batch 1, wanted at most 0.10" in words
    assert "MISSED soon: 2000 ms at batch 1, wanted at most 1000 ms" in words


@pytest.mark.parametrize(
    ("value", "limit", "text"), [(1.8004, 1.8, "1.8004"), (1.7996, 1.8, "1.80"), (1.9, 1.8, "1.90")]
)
def test_a_goal_that_is_just_missed(value, limit, text):
    """Where rounding would show the limit itself, there are digits that tell why it is missed."""
    goal = Goal("soon", "elapsed_time", "a", peer="b", at_most=limit)
    assert value_text(Verdict(goal, {}, value, value <= limit)) == text


def test_narrow_headers():
    """Headers are broken between words, not cut, however narrow the terminal."""
    metrics = ("output_throughput", "mean_ttft_ms", "mean_e2el_ms", "kv_allocated_bytes", "peak_kv_in_use_bytes")
    lines = [Line({"concurrency": n}, "generate in threads", {m: [1234.5] for m in metrics}) for n in range(5)]
    for width in range(50, 120):
        text = printed(Results("x", "A title", "c", {}, columns=list(metrics), lines=lines), width)
        assert "concurrency" in text
        assert "…" not in text


@pytest.mark.parametrize("load", [1.5, 1.6])
def test_a_busy_machine(load):
    """Above a load of 1.5 there is a warning."""
    assert ("WARNING" in printed(make([{"batch": 1}], load), 80)) == (load > 1.5)


def test_nothing_measured():
    """A benchmark in which nobody ran has notes and no ratios."""
    text = printed(Results("x", "A title", "c", {}, columns=COLUMNS, lines=[Line({}, "a", {}, "no")]), 80)

    assert "a: no" in text
    assert "ratio" not in text


def test_markdown():
    """The same tables; cells are told apart even if a name has a bar in it."""
    results = make([{"batch": 1}])
    results.lines.append(Line({"batch": 1}, "a|b", {"elapsed_time": [1.0]}))
    text = markdown(results)

    assert "| ours | 2000 [1800, 2200] |" in text
    assert "| generate | elapsed time, s | 0.33 | 3.0 x faster |" in text
    assert "| a\\|b | 1 |" in text
    assert "- vllm: not installed" in text
    assert "- **MISSED**: soon" in text
