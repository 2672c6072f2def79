"""Chooses how a model's steps are executed: packed if that gives what the model gives row by row, else padded, else singly."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..compat import base_model, logger
from ..errors import PagedCacheError, UnsupportedModelError
from ..pool import BlockPool
from .packed_forward import PackedForward
from .padded_forward import OneByOneForward, PaddedForward
from .pool_memory import PoolMemory
from .request import Chunk, Request, Row
from .rope_forward import RopeForward

CAUGHT = (
    PagedCacheError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward may raise that was not made for what it is asked."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of logits to their greatest, by dtype; 5 % in 16 bits."""


class Forward(Protocol):
    """Executes a step.

    Attributes:
        name: "packed", "padded" or "single".
        whole_prompts: Whether a prompt has to be computed in one piece.
    """

    name: str
    whole_prompts: bool

    def __call__(self, chunks: list[Chunk]) -> torch.Tensor:
        """Computes the chunks; logits `[num_ready, vocab_size]` of the rows that have no token left to compute."""
        ...

    def settle(self) -> None:
        """Rows have all that is theirs: call it before they are forked."""
        ...


def choose_forward(model: Any, pool: BlockPool) -> Forward:
    """Tries the ways of execution on a few tokens, on blocks of their own, and takes the fastest that is right.

    Args:
        model: A patched `PreTrainedModel`, or what `torch.compile` made of one.
        pool: Its pool.

    Raises:
        UnsupportedModelError: The model cannot go back and forth between two sequences.
    """
    inner = base_model(model)
    assert isinstance(inner, PreTrainedModel)
    single = RopeForward if pool.spec.has_length_dependent_rope else OneByOneForward
    ways: list[Callable[[Any, BlockPool], Forward]] = [PackedForward, PaddedForward, single]
    with torch.no_grad():
        try:
            expected = _trial(single(inner, _trial_pool(pool)), is_interleaved=False)
        except CAUGHT as error:
            raise UnsupportedModelError(f"{type(inner).__name__} cannot be batched: {error}") from error
        for way in ways:
            reason = _why_not(way, inner, pool, expected)
            if reason is None:
                return way(model, pool)
            logger.info("%s does not suit %s: %s", way.__name__, type(inner).__name__, reason)
    raise UnsupportedModelError(f"{type(inner).__name__} cannot go back and forth between sequences: {reason}.")


def _why_not(way: Any, model: PreTrainedModel, pool: BlockPool, expected: torch.Tensor) -> str | None:
    """Why a model cannot be executed in one of the ways; None if it can."""
    if way is PackedForward and not pool.spec.is_prefix_exact:
        return "a token depends on more than the tokens before it and their positions"
    if way is PaddedForward and not pool.spec.ignores_padding:
        return "padding is stored"
    if way is PaddedForward and pool.spec.has_length_dependent_rope:
        return "the longest row decides how positions are encoded"
    try:
        logits = _trial(way(model, _trial_pool(pool)), is_interleaved=True)
    except CAUGHT as error:
        return f"{type(error).__name__}: {error}"
    return _why_different(logits, expected, TOLERANCES.get(model.dtype, 0.05))


def _why_different(logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    """How logits differ; None if they do not. A model that forbids tokens gives them -inf or the least of its dtype."""
    least = torch.finfo(torch.float16).min / 2
    allowed = expected.isfinite() & (expected > least)
    if not torch.equal(allowed, logits.isfinite() & (logits > least)):
        return "other logits of a trial are finite"
    if not allowed.any():
        return "no logits of a trial are finite"
    logits, expected = logits[allowed], expected[allowed]
    difference = (logits - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    return None if difference <= tolerance else f"logits of a trial differ by {difference:.2g} of their greatest"


def _trial_pool(pool: BlockPool) -> BlockPool:
    return pool.for_trials(max(8, 16 // pool.block_size) * max(len(pool.storage.layout.windows), 1))


def _trial(forward: Any, is_interleaved: bool) -> torch.Tensor:
    """Logits of two rows of different lengths, a prompt each and two more tokens: `[2, 3, vocab_size]`."""
    vocab_size = forward.model.config.get_text_config(decoder=True).vocab_size
    ids = [[(17 * i + 11 * row + 3) % vocab_size for i in range(length)] for row, length in enumerate((7, 4))]
    requests = [Request(str(row), prompt, 3, rows=[Row(prompt[:-2])]) for row, prompt in enumerate(ids)]
    memory = PoolMemory(forward.pool, shares_prefixes=False)
    try:
        if not is_interleaved:
            return torch.cat([_steps(forward, memory, [request]) for request in requests])
        return _steps(forward, memory, requests)
    finally:
        forward.settle()
        for request in requests:
            memory.release(request)


def _steps(forward: Forward, memory: PoolMemory, requests: list[Request]) -> torch.Tensor:
    found = []
    for request in requests:
        memory.admit(request)
    for _ in range(3):
        chunks = [Chunk(r, r.rows[0], r.rows[0].num_tokens - r.rows[0].num_computed) for r in requests]
        found.append(forward(chunks).float())
        for request in requests:
            request.rows[0].tokens = list(request.prompt_ids[: request.rows[0].num_tokens + 1])
    return torch.stack(found, dim=1)
