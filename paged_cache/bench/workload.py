"""Requests: lengths of a trace, random tokens."""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

TRACES = Path(__file__).resolve().parent / "data"
TRACE = TRACES / "azure23_conv_256.csv"


@dataclass(frozen=True)
class Workload:
    """Requests that are all there at the beginning.

    Attributes:
        prompts: Token ids.
        num_new: How many tokens each of them generates.
        num_shared: Tokens that all prompts start with.
    """

    prompts: list[list[int]]
    num_new: list[int]
    num_shared: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(map(len, self.prompts))

    @property
    def num_new_tokens(self) -> int:
        """Of all requests."""
        return sum(self.num_new)

    @property
    def max_tokens(self) -> int:
        """Of the longest request."""
        return max(len(prompt) + num_new for prompt, num_new in zip(self.prompts, self.num_new, strict=True))

    def first(self, count: int) -> "Workload":
        """The first requests only."""
        return Workload(self.prompts[:count], self.num_new[:count], self.num_shared)

    def describe(self) -> str:
        """One line."""
        count = len(self.prompts)
        return (
            f"{count} requests, prompts of {self.num_prompt_tokens / count:.0f} tokens on average"
            f" ({self.num_shared} shared), answers of {self.num_new_tokens / count:.0f} (at most {max(self.num_new)})"
        )


def read_lengths(count: int, factor: float) -> list[tuple[int, int]]:
    """Prompt and output lengths of the trace's first requests, divided by `factor`, at least 2; again from its start when it ends."""
    with TRACE.open() as lines:
        rows = [(int(row["prompt"]), int(row["output"])) for row in csv.DictReader(lines)]
    scaled = [(max(2, round(prompt / factor)), max(2, round(output / factor))) for prompt, output in rows]
    return [scaled[i % len(scaled)] for i in range(count)]


def make_workload(count: int, factor: float, vocab_size: int, num_shared: int, seed: int) -> Workload:
    """The trace with random tokens; `num_shared` more tokens, the same for all, go before each prompt."""
    tokens = random.Random(seed)
    system = tokens.choices(range(1, vocab_size), k=num_shared)
    lengths = read_lengths(count, factor)
    prompts = [system + tokens.choices(range(1, vocab_size), k=prompt) for prompt, _ in lengths]
    return Workload(prompts, [output for _, output in lengths], num_shared)
