"""The model that everything is tried on, and what it answers without any of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..compat import text_config
from ..errors import InvalidRequestError, UnsupportedModelError
from ..loading import load
from ..memory.layout import plan_layout
from ..model_spec import model_spec
from ..pool import BlockPool
from .settings import DTYPES, Settings
from .texts import Texts, padded

BLOCK_SIZE = 16


class Watch(BaseStreamer):
    """When the tokens of each step were chosen, in seconds from the start.

    Args:
        start: On the clock of `time.perf_counter`; now by default.
        each: Called after each step.
    """

    def __init__(self, start: float | None = None, each: Callable[[], None] = lambda: None) -> None:
        self.moments: list[float] = []
        self._start = time.perf_counter() if start is None else start
        self._each = each
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one step each time."""
        if self._has_prompt:
            self.moments.append(time.perf_counter() - self._start)
            self._each()
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass
class Subject:
    """A model that generates greedily and never stops by itself, prompts for it, and the right answers.

    Attributes:
        model: In evaluation mode.
        settings: See there.
        prompts: Token ids, in the order in which batches and requests take them.
        context: Most tokens that the model can read; None where its config has no limit.
    """

    model: Any
    settings: Settings
    texts: Texts
    prompts: list[list[int]]
    context: int | None
    _answers: dict[tuple[int, ...], list[int]] = field(default_factory=dict, repr=False)

    def generate(self, rows: list[list[int]], num_new: int, cache: Any, **options: Any) -> list[list[int]]:
        """New tokens of a batch that is padded on the left."""
        inputs = padded(rows, self.model.device)
        output = self.model.generate(**inputs, past_key_values=cache, max_new_tokens=num_new, **options)
        tokens: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def answer(self, prompt: list[int], num_new: int) -> list[int]:
        """The right one: of `generate` with a `DynamicCache`, alone and without padding. Computed once."""
        known = self._answers.get(tuple(prompt), [])
        if len(known) < num_new:
            (known,) = self.generate([prompt], num_new, DynamicCache(config=self.model.config))
            self._answers[tuple(prompt)] = known
        return known[:num_new]

    def make_pool(self, rows: list[list[int]], num_new: int) -> BlockPool:
        """One that is large enough for a batch of these."""
        groups = len(plan_layout(model_spec(self.model.config).layers).windows)
        blocks = sum(-(-(len(row) + num_new) // BLOCK_SIZE) + 1 for row in rows)
        return BlockPool.for_model(self.model, num_blocks=blocks * groups, block_size=BLOCK_SIZE)


def load_subject(settings: Settings) -> Subject:
    """The model, its prompts and their lengths checked.

    Raises:
        PagedCacheError: There is no such model or device, nothing to page in it, or prompts that are too long for it.
    """
    _check_device(settings.device)
    model, tokenizer = load(
        settings.model, device=settings.device, dtype=DTYPES[settings.dtype], needs_tokenizer=bool(settings.prompts)
    )
    _check_caches(model)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    model.config.eos_token_id = None
    context = getattr(text_config(model.config), "max_position_embeddings", None)
    texts = Texts(tokenizer, model.config, settings)
    prompts = texts.prompts(context and max(context - settings.max_new_tokens, 1))
    longest = max(map(len, prompts))
    if context and longest + settings.max_new_tokens > context:
        raise InvalidRequestError(
            f"{longest} tokens of prompt and {settings.max_new_tokens} new ones are more than the model's context of "
            f"{context}: use a shorter prompt or a smaller --max-new-tokens."
        )
    return Subject(model, settings, texts, prompts, context)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequestError(f"the device {device!r} cannot be used: {reason}") from error


def _check_caches(model: PreTrainedModel) -> None:
    if not plan_layout(model_spec(model.config).layers).windows:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values, so there is nothing to compare.")
