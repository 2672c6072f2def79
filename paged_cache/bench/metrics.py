"""What names of metrics say: the unit, whether more is better, and how many digits are worth reading."""

import math
from dataclasses import dataclass

from .results import Spread

# vLLM's names that do not end with their unit, or that would read badly: unit, label.
NAMES = {
    "avg_latency": ("s", "mean latency, s"),
    "elapsed_time": ("s", "elapsed time, s"),
    "duration": ("s", "duration, s"),
    "latencies": ("s", "latency, s"),
    "requests_per_second": ("/s", "requests/s"),
    "tokens_per_second": ("/s", "tokens/s"),
    "request_throughput": ("/s", "requests/s"),
    "request_goodput": ("/s", "good requests/s"),
    "output_throughput": ("/s", "output tokens/s"),
    "total_token_throughput": ("/s", "tokens/s"),
}
UNITS = {
    "ms": "ms",
    "us": "us",
    "s": "s",
    "bytes": "B",
    "percent": "%",
    "throughput": "/s",
    "gbps": "GB/s",
    "slots": "slots",
}
ABBREVIATIONS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL", "kv": "KV"}
SCALES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
MORE_IS_BETTER, LESS_IS_BETTER = {"/s", "GB/s"}, {"ms", "us", "s", "B", "%", "slots"}
SAME = 1.005
"""A factor below this one is not worth a word."""


@dataclass(frozen=True)
class Metric:
    """Reads a metric's name."""

    name: str

    @property
    def unit(self) -> str:
        """Short; empty for counts."""
        known = NAMES.get(self.name)
        return known[0] if known else UNITS.get(self.name.rpartition("_")[2], "")

    @property
    def label(self) -> str:
        """For people: "mean TTFT, ms"; without the unit where each number has it."""
        if self.name in NAMES:
            return NAMES[self.name][1]
        words = self.name.split("_")[: -1 if self.unit else None]
        text = " ".join(ABBREVIATIONS.get(word, word) for word in words)
        return text + {"": "", "B": "", "%": "", "/s": "/s", "slots": " slots"}.get(self.unit, f", {self.unit}")

    @property
    def is_better_high(self) -> bool | None:
        """None for counts, which are neither."""
        if self.unit in MORE_IS_BETTER:
            return True
        return False if self.unit in LESS_IS_BETTER else None

    def number(self, value: float) -> str:
        """Three digits that count, and the unit where it is part of the number."""
        return self.spread(Spread(value, value, value))[0]

    def spread(self, spread: Spread) -> tuple[str, str]:
        """The median, and "[least, most]" in the same unit, empty where nothing varies."""
        factor, unit = 1, " %" if self.unit == "%" else ""
        if self.unit == "B":
            factor, name = next((pair for pair in SCALES if abs(spread.median) >= pair[0]), SCALES[-1])
            unit = f" {name}"
        median, rest = _parts([digits(value / factor) for value in (spread.median, spread.min, spread.max)])
        return median + unit, rest

    def words(self, ratio: float) -> str:
        """What ours / theirs means: "3.2 x faster"; empty for counts."""
        if self.is_better_high is None or ratio <= 0:
            return ""
        factor = max(ratio, 1 / ratio)
        if factor < SAME:
            return "the same"
        better, worse = ("smaller", "larger") if self.unit in ("B", "%", "slots") else ("faster", "slower")
        return f"{_times(factor)} x {better if (ratio > 1) == self.is_better_high else worse}"

    def verdict(self, ratio: Spread) -> str:
        """The same for ratios of several rounds: "no clear difference" where they lie on both sides of 1."""
        is_open = ratio.min < 1 < ratio.max or (1 in (ratio.min, ratio.max) and ratio.min != ratio.max)
        return "no clear difference" if is_open and self.words(ratio.median) else self.words(ratio.median)


def digits(value: float) -> str:
    """Three digits that count; whole numbers in full, with commas from 10,000 on."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.0f}"
    if abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def ratio_text(spread: Spread) -> str:
    """`0.31 [0.30, 0.33]`."""
    return " ".join(_parts([_ratio(value) for value in (spread.median, spread.min, spread.max)])).strip()


def _parts(texts: list[str]) -> tuple[str, str]:
    median, least, most = texts
    return median, "" if least == median == most else f"[{least}, {most}]"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if 0.1 <= value < 10 else digits(value)


def _times(factor: float) -> str:
    return f"{factor:.2f}" if factor < 2 else f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"
