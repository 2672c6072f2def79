"""What `paged-cache demo` does and measures. `demo_report.py` shows it, `cli.py` starts it."""

import inspect
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from .cache import PagedCache
from .compat import text_config
from .errors import InvalidRequestError, UnsupportedModelError
from .kv_memory import Memory, dense_memory, key_value_tensors, paged_memory
from .loading import SMALL
from .memory.layout import plan_layout
from .model_spec import ModelSpec, model_spec
from .patching import patch
from .pool import BlockPool

BLOCK_SIZE = 16
NUM_BEAMS = 8
SHORT = 16
"""New tokens where the prompt is what matters."""
HEADER_TOKENS = 768
INPUTS = ("input_ids", "attention_mask")

PROMPTS = (
    "async def main():\n",
    "class Queue:\n    def __len__(self):\n        return len(self._items)\n\n    def ",
    "import json\n\n\ndef read(path):\n    try:\n        with open(path) as file:\n            return json.load(file)\n    except",
    inspect.cleandoc("""
        class Point:
            def __init__(self, x, y):
                self.x = x
                self.y = y

            def __repr__(self):
                return f"Point({self.x}, {self.y})"

            def __add__(self, other):
                return Point(self.x + other.x, self.y + other.y)

            def __sub__(self, other):
                return Point(self.x - other.x, self.y - other.y)

            def __eq__(self, other):
    """)
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
    """One model and one pool; each method is a step of the demo.

    Attributes:
        pool: Large enough for all steps, with some blocks left over.
        caches: Those that are still in use, by the name they have in the picture.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> None:
        self.model: Any = model
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.inputs = {name: tokenizer(prompts, return_tensors="pt", padding=True)[name] for name in INPUTS}
        if not self._windows:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps no keys and values, so there is nothing to page."
            )
        self.prompts = [ids[mask != 0] for ids, mask in zip(*self.inputs.values(), strict=True)]
        self._check_lengths()
        self.headed_prompts = self._headed_prompts()
        self.pool = self._make_pool()
        self.caches: dict[str, PagedCache] = {}

    def warm_up(self) -> None:
        """Compiles kernels and touches memory, so that times are those of a program that runs."""
        pool = BlockPool.for_model(self.model, num_blocks=64 * len(self._windows))
        for ids in (self.prompts[0], self.headed_prompts[0][:256]):
            self._generate(ids[None], PagedCache(pool), max_new_tokens=2)
            self._generate(ids[None], None, max_new_tokens=2)

    def batch(self) -> list[Row]:
        """All prompts at once through a `PagedCache`, and each alone without it."""
        cache = self.caches["batch"] = PagedCache(self.pool)
        output = self._generate(self.inputs["input_ids"], cache, attention_mask=self.inputs["attention_mask"])
        width = self.inputs["input_ids"].shape[1]
        alone = [self._generate(ids[None], None)[0, len(ids) :] for ids in self.prompts]
        return [
            Row(prompt.tolist(), self._to_end(row[width:]), self._to_end(expected))
            for prompt, row, expected in zip(self.prompts, output, alone, strict=True)
        ]

    def memory(self, rows: list[Row]) -> list[Memory]:
        """K and V of the batch in transformers' caches and in ours, each measured after it was used."""
        dynamic = DynamicCache(config=self.model.config)
        self._generate(**self.inputs, cache=dynamic)
        length = self.inputs["input_ids"].shape[1] + self.max_new_tokens
        static_length = 1 << (length - 1).bit_length()
        static = StaticCache(config=self.model.config, max_cache_len=static_length)
        self._generate(**self.inputs, cache=static, max_new_tokens=1)
        end = dynamic.get_seq_length()
        spans = [_span(row, self.inputs["input_ids"].shape[1], end) for row in rows]
        return [
            dense_memory(f"StaticCache({static_length})", static, spans, end),
            dense_memory("DynamicCache, padded", dynamic, spans, end),
            paged_memory("PagedCache", self.caches["batch"], [b - a for a, b in spans]),
        ]

    def reuse(self) -> list[Call]:
        """Two prompts that start alike, one after the other."""
        return [self._call(0, "first call", keep=False), self._call(1, "second call", keep=True)]

    def beams(self) -> Beams:
        """A beam search over a prompt that starts like those before."""
        ids, cache = self.headed_prompts[2], PagedCache(self.pool)
        self.caches["beams"] = cache
        dynamic = DynamicCache(config=self.model.config)
        options = {"max_new_tokens": SHORT, "num_beams": NUM_BEAMS}
        output = self._generate(ids[None], cache, **options)
        expected = self._generate(ids[None], dynamic, **options)
        tables = [[block for table in row for block in table if block >= 0] for row in cache.block_tables]
        num_blocks = len({block for table in tables for block in table})
        return Beams(
            num_beams=NUM_BEAMS,
            num_prompt=len(ids),
            num_blocks=num_blocks,
            num_separate=sum(len(table) for table in tables),
            nbytes=num_blocks * self.pool.nbytes // self.pool.num_blocks,
            dynamic_nbytes=sum(keys.nbytes + values.nbytes for keys, values in key_value_tensors(dynamic)),
            is_identical=torch.equal(output, expected),
        )

    def _call(self, index: int, name: str, keep: bool) -> Call:
        ids, cache = self.headed_prompts[index], PagedCache(self.pool)
        with count_tokens(self.model) as counts:
            start = time.perf_counter()
            output = self._generate(ids[None], cache, max_new_tokens=SHORT)
            seconds = time.perf_counter() - start
        if keep:
            self.caches[name] = cache
        else:
            cache.release()
        expected = self._generate(ids[None], None, max_new_tokens=SHORT)
        return Call(name, len(ids), counts[0], sum(counts[1:]), seconds, torch.equal(output, expected))

    def _generate(self, input_ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
        """`model.generate`, patched for a `PagedCache`, untouched for any other."""
        mask = options.pop("attention_mask", torch.ones_like(input_ids))
        options = {"max_new_tokens": self.max_new_tokens, "num_beams": 1} | options
        with patch(self.model) if isinstance(cache, PagedCache) else nullcontext():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=cache,
                do_sample=False,
                repetition_penalty=1.0,  # it would see the padding of a batch
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        assert isinstance(output, torch.Tensor)
        return output

    def _to_end(self, ids: torch.Tensor) -> list[int]:
        """New tokens up to the one that ends the text, without what pads the row after it."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        tokens: list[int] = ids.tolist()
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]

    def _headed_prompts(self) -> list[torch.Tensor]:
        length = HEADER_TOKENS if self.model.num_parameters() < SMALL else HEADER_TOKENS // 4  # the demo is to end soon
        length = min(length, (self._context or length * 2) // 2)
        header = self.tokenizer(HEADER[: 8 * length])["input_ids"][:length]
        questions = self.tokenizer(list(QUESTIONS), add_special_tokens=False)["input_ids"]
        return [torch.tensor([*header, *question]) for question in questions]

    def _check_lengths(self) -> None:
        lengths = [len(ids) for ids in self.prompts]
        if not min(lengths):
            raise InvalidRequestError(f"prompt {lengths.index(0) + 1} is empty for this tokenizer; give it some text.")
        if self._context and max(lengths) + self.max_new_tokens > self._context:
            raise InvalidRequestError(
                f"{max(lengths)} tokens of prompt and {self.max_new_tokens} new ones are more than the model's context "
                f"of {self._context}: use a shorter prompt or a smaller --max-new-tokens."
            )

    @property
    def _context(self) -> int | None:
        return getattr(text_config(self.model.config), "max_position_embeddings", None)

    @cached_property
    def _spec(self) -> ModelSpec:
        return model_spec(self.model.config)

    @cached_property
    def _windows(self) -> tuple[int | None, ...]:
        return plan_layout(self._spec.layers).windows

    def _make_pool(self) -> BlockPool:
        batch = [len(ids) + self.max_new_tokens for ids in self.prompts]
        headed = max(len(ids) for ids in self.headed_prompts) + SHORT
        beams = [4 * SHORT if self._spec.is_prefix_exact else headed + SHORT] * NUM_BEAMS
        needed = sum(-(-num_tokens // BLOCK_SIZE) for num_tokens in [*batch, headed, *beams])
        num_blocks = -(-needed * 9 // 8 // 32) * 32 * len(self._windows)
        return BlockPool.for_model(self.model, num_blocks=num_blocks, block_size=BLOCK_SIZE)


@contextmanager
def count_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list that gets, for every forward, how many tokens entered the model."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    try:
        yield counts
    finally:
        hook.remove()


def _span(row: Row, width: int, end: int) -> tuple[int, int]:
    """First column of a row that is no padding, and the one after its last; the last new token is never stored."""
    return width - len(row.prompt), min(width + len(row.generated), end)
