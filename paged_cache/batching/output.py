"""What becomes of a request."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

FINISH_REASONS = ("stop", "length", "abort", "error", "rejected", "timeout")
"""A token or a criterion ended it; as long as allowed; cancelled; something failed; never begun; out of time."""


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request, in seconds; None for what it did not come to.

    Attributes:
        arrival_time: When it was submitted, on the batcher's clock.
        queue_time: From there until it was first scheduled.
        ttft: From there until its first token.
        tpot: From its first token to its last, per token behind the first.
        e2e_latency: From its arrival to its end.
        num_preemptions: How often it lost its blocks and was computed anew.
    """

    arrival_time: float
    queue_time: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    e2e_latency: float | None = None
    num_preemptions: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """The end of a request: every submitted request gets exactly one.

    Attributes:
        request_id: As given or made at submit.
        prompt_ids: Token ids of the prompt.
        generated_tokens: Token ids behind the prompt, of the first returned sequence; what there was, if it did not end
            by itself.
        finish_reason: One of `FINISH_REASONS`.
        error: What went wrong, for "error" and "rejected".
        cached_tokens: Prompt tokens whose K and V the pool already had.
        metrics: See `RequestMetrics`.
        sequences: All returned sequences (`num_return_sequences`), the first included.
        sequences_scores: float32 `[num_return_sequences]`, of a beam search with `output_scores`.
        scores, logits: Per generated token `[num_sequences, vocab_size]`, with `return_dict_in_generate` and
            `output_scores` or `output_logits`.
        adapter_name: As given at submit.
    """

    request_id: str
    prompt_ids: list[int]
    generated_tokens: list[int]
    finish_reason: str
    error: Exception | None = None
    cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    sequences: list[list[int]] = field(default_factory=list)
    sequences_scores: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    adapter_name: str | None = None

    _tokenizer: ClassVar[Any] = None  # no fields: what people print, compare and store are tokens
    _texts: ClassVar[list[str] | None] = None

    def decoded_by(self, tokenizer: Any) -> "RequestOutput":
        """Itself; from now on `text` is what this tokenizer says."""
        object.__setattr__(self, "_tokenizer", tokenizer)
        return self

    @property
    def text(self) -> str:
        """`generated_tokens` as text, special tokens left out; needs the batcher's tokenizer."""
        return self.texts[0] if self.sequences else ""

    @property
    def texts(self) -> list[str]:
        """`sequences` as text.

        Raises:
            ValueError: The batcher has no tokenizer.
        """
        if self._texts is not None:
            return self._texts
        if self._tokenizer is None:
            raise ValueError("text needs a tokenizer: ContinuousBatcher(model, pool, tokenizer=tokenizer).")
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in self.sequences]
        object.__setattr__(self, "_texts", texts)
        return texts

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the text in place of the tokenizer."""
        state = dict(vars(self))
        if state.pop("_tokenizer", None) is not None:
            state["_texts"] = self.texts
        return state
