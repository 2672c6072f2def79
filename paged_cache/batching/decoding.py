"""Output processing of one request: which processors and criteria it has, what it chose, when it is complete."""

import time
from collections.abc import Hashable
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processes
from transformers.generation import stopping_criteria as criteria_

from .preparing import Prepared
from .request import Row

SHARED: dict[type, tuple[str, ...]] = {
    processes.RepetitionPenaltyLogitsProcessor: ("penalty",),
    processes.TemperatureLogitsWarper: ("temperature",),
    processes.TopKLogitsWarper: ("top_k", "filter_value"),
    processes.TopPLogitsWarper: ("top_p", "filter_value", "min_tokens_to_keep"),
    processes.MinPLogitsWarper: ("min_p", "filter_value", "min_tokens_to_keep"),
    processes.TypicalLogitsWarper: ("mass", "filter_value", "min_tokens_to_keep"),
    processes.EpsilonLogitsWarper: ("epsilon", "filter_value", "min_tokens_to_keep"),
    processes.InfNanRemoveLogitsProcessor: (),
    processes.LogitNormalization: (),
}
"""Processors that look at the scores of one row, with what their result depends on;"""

NEEDS_IDS = {processes.RepetitionPenaltyLogitsProcessor}
"""and those among them that look at which tokens the row has, in whatever order."""


class Decoding:
    """Greedy search or sampling; see `request.Search`.

    Args:
        prepared: The request as `generate` understands it.
        generator: Where random numbers come from; None for greedy search.

    Attributes:
        rows: All sequences, complete ones included.
        reasons: Why each is complete: "stop", "length", "timeout"; None while it is not.
        is_plain: One greedy sequence without processors.
        own, shared: Processors that need the request's own call, and those behind them that others may share.
        shared_key: Equal keys mean equal `shared`.
        shares_ids: Whether `shared` looks at `input_ids`.
        chosen: The next tokens, if they were chosen in a step that was interrupted before it accepted them.
    """

    def __init__(self, prepared: Prepared, generator: torch.Generator | None) -> None:
        config = prepared.config
        self.config, self.streamer, self.generator = config, prepared.streamer, generator
        self.prompt_ids: list[int] = prepared.input_ids[0].tolist()
        self.num_rows = len(prepared.input_ids)
        self.do_sample = bool(config.do_sample)
        self.own, self.shared, self.shared_key = _split(prepared.processors)
        self.max_length, self.eos_ids, self.criteria = read_criteria(prepared.criteria)
        self.max_new_tokens = max(self.max_length - len(self.prompt_ids), 1)
        self.rows: list[Row] = []
        self.reasons: list[str | None] = [None] * self.num_rows
        keeps = bool(config.return_dict_in_generate)
        self.sequences_scores = None
        self.scores: list[torch.Tensor] | None = [] if keeps and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if keeps and config.output_logits else None
        keeps_any = self.scores is not None or self.logits is not None
        self.is_plain = not (self.do_sample or self.own or self.shared or keeps_any or self.num_rows > 1)
        self._pad = int(config.pad_token_id) if isinstance(config.pad_token_id, int) else 0
        self.shares_ids = any(type(processor) in NEEDS_IDS for processor in self.shared)
        needs_ids = self.own or self.criteria or self.shares_ids
        self._ids: torch.Tensor | None = prepared.input_ids if needs_ids else None
        self._is_simple = self._ids is None and self.num_rows == 1
        self._length = len(self.prompt_ids)
        self.chosen: list[int] | None = None

    def close(self) -> None:
        """Nothing to end."""

    @property
    def is_complete(self) -> bool:
        """Whether every sequence is."""
        return None not in self.reasons

    @property
    def input_ids(self) -> Any:
        """int64 `[num_rows, length]`: what processors and criteria look at."""
        assert self._ids is not None
        return self._ids[:, : self._length]

    def begin(self) -> None:
        """The first token is about to be computed: from here on `max_time` counts."""
        start_clocks(self.criteria)

    def sequences(self) -> list[list[int]]:
        """Generated tokens of each sequence."""
        return [row.tokens[len(self.prompt_ids) :] for row in self.rows]

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores `[num_rows, vocab_size]` behind the request's own processors."""
        scores: Any = logits.clone()
        for processor in self.own:
            scores = processor(self.input_ids, scores)
        if not isinstance(scores, torch.Tensor) or scores.shape != logits.shape:
            shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise TypeError(f"logits processors returned {shape} in place of scores of shape {tuple(logits.shape)}.")
        return scores

    def keep(self, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Remembers `[num_rows, vocab_size]` of this token, if that was asked for."""
        if self.logits is not None:
            self.logits.append(logits.clone())
        if self.scores is not None:
            self.scores.append(scores.clone())

    def accept(self, tokens: list[int]) -> None:
        """Appends a token to each sequence that is not complete, and looks which are complete now; all or nothing."""
        self._length += 1
        if self._is_simple:
            self._accept_one(tokens[0])
        else:
            reasons, lengths = list(self.reasons), [len(row.tokens) for row in self.rows]
            try:
                self._accept_all(tokens)
            except BaseException:
                self._length, self.reasons = self._length - 1, reasons
                for row, length in zip(self.rows, lengths, strict=True):
                    del row.tokens[length:]
                raise
        self.chosen = None

    def _accept_all(self, tokens: list[int]) -> None:
        if self._ids is not None:
            self._write(tokens)
        is_last = self._length >= self.max_length
        for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if self.reasons[i] is None:
                row.tokens.append(token)
                if token in self.eos_ids:
                    self.reasons[i] = "stop"
        if self.criteria:
            self._ask_criteria()
        if is_last:
            self.reasons = [reason or "length" for reason in self.reasons]

    def _accept_one(self, token: int) -> None:
        self.rows[0].tokens.append(token)
        if token in self.eos_ids:
            self.reasons[0] = "stop"
        elif self._length >= self.max_length:
            self.reasons[0] = "length"

    def _write(self, tokens: list[int]) -> None:
        """`input_ids` with one more column, padding for complete sequences."""
        assert self._ids is not None
        if self._ids.shape[1] < self._length:
            room = min(self.max_length, 2 * self._length) - self._ids.shape[1]
            self._ids = torch.cat([self._ids, self._ids.new_empty(self.num_rows, max(room, 1))], dim=1)
        column = [self._pad if reason else token for token, reason in zip(tokens, self.reasons, strict=True)]
        self._ids[:, self._length - 1] = torch.tensor(column, device=self._ids.device)

    def _ask_criteria(self) -> None:
        scores: Any = tuple(self.scores) if self.scores is not None else None
        for criterion in self.criteria:
            done = criterion(self.input_ids, scores)
            reason = "timeout" if isinstance(criterion, criteria_.MaxTimeCriteria) else "stop"
            flags = done.tolist() if isinstance(done, torch.Tensor) and done.dim() else [bool(done)] * self.num_rows
            self.reasons = [old or (reason if flag else None) for old, flag in zip(self.reasons, flags, strict=True)]


def _split(processors: LogitsProcessorList) -> tuple[list[Any], list[Any], Hashable]:
    """Processors of a request's own and the shareable ones behind them, with the latter's key."""
    first = len(processors)
    while first and _is_shared(processors[first - 1]):
        first -= 1
    key = tuple((type(p).__name__, *(float(getattr(p, name)) for name in SHARED[type(p)])) for p in processors[first:])
    return list(processors[:first]), list(processors[first:]), key


def _is_shared(processor: Any) -> bool:
    options = (getattr(processor, name, None) for name in ("prompt_ignore_length", "logits_indices"))
    return type(processor) in SHARED and all(option is None for option in options)


def read_criteria(criteria: Any) -> tuple[int, frozenset[int], list[Any]]:
    """The longest length, the tokens that end a sequence, and the criteria that have to be asked."""
    max_length, eos_ids, others = [2**62], set(), []
    for criterion in criteria:
        if type(criterion) is criteria_.MaxLengthCriteria:
            max_length.append(criterion.max_length)
        elif type(criterion) is criteria_.EosTokenCriteria:
            eos_ids.update(criterion.eos_token_id.tolist())
        else:
            others.append(criterion)
    return min(max_length), frozenset(eos_ids), others


def start_clocks(criteria: list[Any]) -> None:
    """From now on `max_time` counts."""
    for timer in _timers(criteria):
        timer.initial_timestamp = time.time()


def is_late(criteria: list[Any]) -> bool:
    """Whether `max_time` is over."""
    return any(time.time() - timer.initial_timestamp > timer.max_time for timer in _timers(criteria))


def _timers(criteria: list[Any]) -> list[Any]:
    return [criterion for criterion in criteria if isinstance(criterion, criteria_.MaxTimeCriteria)]
