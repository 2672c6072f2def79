"""Prompts of different lengths as token ids: given texts, pieces of Python's own library, or random tokens."""

import bisect
import heapq
import inspect
import json.decoder
import queue
import random
import statistics
import string
import textwrap
from typing import Any

import torch

from ..compat import text_config
from ..errors import InvalidRequestError
from .settings import Settings

SOURCES = (textwrap, queue, heapq, json.decoder, statistics, string, bisect)
LONGEST, LONGEST_QUICK = 192, 24
"""Tokens of a prompt, unless `input_len` says otherwise; the second one with --quick."""
SHORTEST = 8
CHARACTERS = 8
"""More than a token has, on average."""


class Texts:
    """Where prompts come from.

    Args:
        tokenizer: None for random tokens.
        config: The model's.
        settings: See there.
    """

    def __init__(self, tokenizer: Any, config: Any, settings: Settings) -> None:
        if tokenizer is None and settings.prompts:
            raise InvalidRequestError(
                f"{settings.model} has no tokenizer for {settings.prompts[0]!r}: give --input-len instead of prompts."
            )
        self._tokenizer, self._settings = tokenizer, settings
        self._vocab_size = int(text_config(config).vocab_size)
        self._random = random.Random(settings.seed)

    def prompts(self, longest: int | None) -> list[list[int]]:
        """As many as are needed, all different unless the given ones are fewer; none has more than `longest` tokens."""
        count, given = self._settings.num_requests, self._settings.prompts
        if given:
            rows = [self._tokenizer(text, verbose=False)["input_ids"] for text in given]
            if not all(rows):
                raise InvalidRequestError("a prompt is empty for this tokenizer; give it some text.")
            return [rows[i % len(rows)] for i in range(count)]
        asked = self._settings.input_len
        if asked and longest and asked > longest:
            raise InvalidRequestError(
                f"input_len is {asked}: with {self._settings.max_new_tokens} new tokens, prompts of this model have at most "
                f"{longest}. Give a smaller --input-len or --max-new-tokens."
            )
        usual = LONGEST_QUICK if self._settings.is_quick else LONGEST
        most = asked or min(usual, longest or usual)
        lengths = spread(SHORTEST, most, count)
        self._random.shuffle(lengths)
        return [self._piece(i, length) for i, length in enumerate(lengths)]

    def long_prompt(self, length: int) -> list[int]:
        """One of so many tokens."""
        if self._tokenizer is None:
            return self._random_ids(length)
        text = "\n".join(inspect.getsource(source) for source in SOURCES)
        ids: list[int] = self._tokenizer(text[: CHARACTERS * length], verbose=False)["input_ids"]
        return (ids * -(-length // len(ids)))[:length]

    def _piece(self, number: int, length: int) -> list[int]:
        if self._tokenizer is None:
            return self._random_ids(length)
        lines = inspect.getsource(SOURCES[number % len(SOURCES)]).splitlines(keepends=True)
        first = 7 * number % (len(lines) // 2)
        text = "".join(lines[first:] + lines)
        ids: list[int] = self._tokenizer(text[: CHARACTERS * length], verbose=False)["input_ids"]
        return (ids * -(-length // len(ids)))[:length]

    def _random_ids(self, length: int) -> list[int]:
        return self._random.choices(range(1, self._vocab_size), k=length)


def spread(least: int, most: int, count: int) -> list[int]:
    """So many numbers from `least` to `most`, few of them large: equal ratios between neighbours."""
    least = min(least, most)
    if count == 1:
        return [most]
    return [round(least * (most / least) ** (i / (count - 1))) for i in range(count)]


def padded(rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[batch, width]`, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
