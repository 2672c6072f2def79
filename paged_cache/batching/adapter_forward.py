"""Model execution where rows of one step have different adapters."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..adapters.activation import activated
from ..adapters.grouped import GroupedLora, NotGrouped, Span
from ..pool import BlockPool
from .forwards import Forward
from .request import Chunk

Part = list[int]
"""Chunks of a step, by their number, that one forward computes."""


class AdapterForward:
    """Runs each chunk with the adapter of its request.

    Rows of adapters that are plain LoRA share one packed forward, as do those without adapters. Each other adapter has a
    forward of its own, in which it is the active one: whatever peft can do is done by peft.

    Args:
        forward: Executes rows without an adapter of their own.
        direct: Executes the others: the same way of execution on the model itself, since what `torch.compile` made of it
            does not see which adapters are active.
        pool: Knows peft's layers in the model.

    Attributes:
        num_grouped, num_separate: Forwards in which rows had adapters: several of plain LoRA, and one that was activated.
    """

    def __init__(self, forward: Forward, direct: Forward, pool: BlockPool) -> None:
        assert pool.weights is not None
        self.inner, self._direct, self._weights = forward, direct, pool.weights
        self.name, self.whole_prompts = forward.name, forward.whole_prompts
        self.num_grouped = self.num_separate = 0
        self._tuners: list[object] = []
        self._grouped = GroupedLora([])

    def __call__(self, chunks: list[Chunk]) -> torch.Tensor:
        """Computes the chunks' tokens, in the order that `by_adapter` gives; see `PackedForward`.

        If one of several forwards fails, `num_computed` of the rows in those before it is what it would be.
        """
        with self._weights.lock:
            if all(chunk.request.adapter_name is None for chunk in chunks):
                return self.inner(chunks)
            tuners = self._weights.tuners
            if tuners is not self._tuners:
                self._tuners, self._grouped = tuners, GroupedLora(tuners)
            return self._compute(chunks)

    def settle(self) -> None:
        """Rows have all that is theirs."""
        self.inner.settle()
        self._direct.settle()

    def _compute(self, chunks: list[Chunk]) -> torch.Tensor:
        parts = self._parts(chunks)
        ready = [i for part in parts for i in part if _is_ready(chunks[i])]
        logits = [self._run([chunks[i] for i in part]) for part in parts]
        found = [x for x in logits if len(x)]
        if len(found) < 2:  # in the order of the chunks, since those of one adapter are neighbours
            return found[0] if found else logits[0]
        return torch.cat(found)[sorted(range(len(ready)), key=ready.__getitem__)]

    def _parts(self, chunks: list[Chunk]) -> list[Part]:
        """One part of all chunks whose adapters can be grouped, in the order of the adapters; one of each other adapter."""
        groups: dict[str | None, Part] = {}
        for i, chunk in enumerate(chunks):
            groups.setdefault(chunk.request.adapter_name, []).append(i)
        if self.name != "packed":
            return list(groups.values())
        covered = {name for name in groups if self._grouped.covers(name)}
        together = [i for name, part in groups.items() if name in covered for i in part]
        others = [part for name, part in groups.items() if name not in covered]
        return [together, *others] if together else others

    def _run(self, chunks: list[Chunk]) -> torch.Tensor:
        name = chunks[0].request.adapter_name
        if self.name == "packed" and self._grouped.covers(name):
            try:
                return self._run_grouped(chunks)
            except NotGrouped:  # some of them are not covered any more
                return self._compute(chunks)
        self.num_separate += 1
        with self._activated(name):
            return self._direct(chunks)

    def _run_grouped(self, chunks: list[Chunk]) -> torch.Tensor:
        every = _spans(chunks, (chunk.num_tokens for chunk in chunks))
        kept = _spans(chunks, map(_is_ready, chunks)) or [Span(chunks[-1].request.adapter_name, 0, 1)]
        with self._grouped.running(every, kept):
            logits = self._direct(chunks)
        self.num_grouped += 1
        return logits

    def _activated(self, adapter_name: str | None) -> AbstractContextManager[None]:
        return nullcontext() if adapter_name is None else activated(self._tuners, adapter_name)


def by_adapter(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks in an order in which those of one adapter are neighbours."""
    names = [chunk.request.adapter_name for chunk in chunks]
    if all(name is None for name in names):
        return chunks
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return sorted(chunks, key=lambda chunk: places[chunk.request.adapter_name])


def _is_ready(chunk: Chunk) -> bool:
    """Whether the chunk is the last one of its row, so that its logits are asked for."""
    return chunk.row.num_computed + chunk.num_tokens == chunk.row.num_tokens


def _spans(chunks: list[Chunk], counts: Iterable[int]) -> list[Span]:
    """Neighbours with one adapter are one span; each chunk has so many tokens."""
    spans: list[Span] = []
    end = 0
    for chunk, count in zip(chunks, counts, strict=True):
        start, end, name = end, end + count, chunk.request.adapter_name
        if spans and spans[-1].adapter_name == name:
            spans[-1] = spans[-1]._replace(stop=end)
        elif count:
            spans.append(Span(name, start, end))
    return spans
