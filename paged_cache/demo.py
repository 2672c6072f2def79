"""What `paged-cache demo` does and measures. `demo_report.py` shows it, `cli.py` starts it."""

import inspect
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from .cache import PagedCache
from .errors import InvalidRequestError
from .patching import patch, unpatch
from .pool import BlockPool

BLOCK_SIZE = 16
NUM_BEAMS = 8
SHORT = 16
"""New tokens where the prompt is what matters."""

PROMPTS = (
    "def main():\n",
    'class Stack:\n    """Last in, first out."""\n\n    def push(self, item):\n',
    "import json\nimport os\n\n\ndef read_config(path):\n    with open(path) as file:\n",
    inspect.cleandoc('''
        class TestParser(unittest.TestCase):
            def setUp(self):
                self.parser = Parser()

            def tearDown(self):
                self.parser.close()

            def test_empty(self):
                self.assertEqual(self.parser.parse(""), [])

            def test_one_line(self):
                self.assertEqual(self.parser.parse("a = 1"), ["a", "=", "1"])

            def test_error(self):
                with self.assertRaises(ValueError):
    ''')
    + "\n",
)
HEADER = inspect.getsource(textwrap)
QUESTIONS = ("\n\ndef wrap_lines(lines):\n", "\n\ndef remove_indent(text, width):\n", "\n\nclass Paragraph:\n")


@dataclass(frozen=True)
class Row:
    """One prompt of the batch: its ids, what `PagedCache` continued, and what `DynamicCache` did, alone and unpadded."""

    prompt: list[int]
    generated: list[int]
    expected: list[int]

    @property
    def is_identical(self) -> bool:
        """Whether both are the same, token for token."""
        return self.generated == self.expected

    @property
    def first_difference(self) -> int:
        """Place of the first new token that differs."""
        pairs = zip(self.generated, self.expected, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.generated), len(self.expected)))


@dataclass(frozen=True)
class Memory:
    """Bytes of K and V: allocated, and those of them that hold tokens somebody asked for."""

    name: str
    reserved: int
    used: int

    @property
    def wasted(self) -> int:
        """Allocated for nothing."""
        return self.reserved - self.used

    @property
    def wasted_share(self) -> float:
        """Of what is allocated."""
        return self.wasted / max(self.reserved, 1)


@dataclass(frozen=True)
class Call:
    """One `generate`: tokens of its prompt, those that entered the model for it, seconds, same result as without us."""

    name: str
    num_prompt: int
    num_computed: int
    num_decoded: int
    seconds: float
    is_identical: bool


@dataclass(frozen=True)
class Beams:
    """A beam search: blocks it holds, blocks of as many separate copies, bytes of both ways, same result."""

    num_beams: int
    num_prompt: int
    num_blocks: int
    num_separate: int
    nbytes: int
    dynamic_nbytes: int
    is_identical: bool


class Demo:
    """One model and one pool; each method is a step of the demo, in this order.

    Attributes:
        caches: Those that are still in use, by the name they have in the picture.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        self.caches: dict[str, PagedCache] = {}
        self._require_room([len(ids) for ids in self.prompt_ids])

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """Per prompt its ids, without padding."""
        rows = zip(self.inputs["input_ids"], self.inputs["attention_mask"], strict=True)
        return [ids[mask != 0].tolist() for ids, mask in rows]

    @cached_property
    def pool(self) -> BlockPool:
        """Large enough for all steps, with some blocks left over."""
        new = self.max_new_tokens
        tokens = [len(ids) + new for ids in self.prompt_ids] + [len(self.header) + 64] + [4 * SHORT] * NUM_BEAMS
        num_blocks = sum(-(-n // BLOCK_SIZE) for n in tokens) * 5 // 4
        groups = self.num_groups
        return BlockPool.for_model(self.model, num_blocks=-(-num_blocks * groups // 32) * 32, block_size=BLOCK_SIZE)
