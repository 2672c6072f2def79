"""What happens to requests and in steps, for whoever observes a batcher."""

from collections.abc import Callable
from dataclasses import dataclass

from .output import RequestMetrics


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened.

    Attributes:
        time: When, in seconds on the batcher's clock.
    """

    time: float


@dataclass(frozen=True, slots=True)
class RequestEvent(Event):
    """Something happened to a request.

    Attributes:
        request_id: Whose.
    """

    request_id: str


@dataclass(frozen=True, slots=True)
class Queued(RequestEvent):
    """A request was handed in and waits.

    Attributes:
        num_prompt_tokens: Of its prompt.
        max_new_tokens: Most tokens that it generates, per sequence.
        num_rows: Sequences that it decodes at once.
        priority: Lower is sooner.
        adapter_name: As given at submit; None for those that are active.
    """

    num_prompt_tokens: int
    max_new_tokens: int
    num_rows: int
    priority: int
    adapter_name: str | None


@dataclass(frozen=True, slots=True)
class Scheduled(RequestEvent):
    """A request runs from now on, for the first time or again.

    Attributes:
        num_tokens: To compute K and V of: the prompt and, if it ran before, what it had generated.
        num_cached_tokens: Those of them that the pool has.
        is_first: Whether it runs for the first time.
    """

    num_tokens: int
    num_cached_tokens: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class Prefilled(RequestEvent):
    """A step computed a piece of a request's prompt, or of what it lost when it was preempted.

    Attributes:
        start: When the forward began; `time` is its end.
        position: Place of the first of these tokens in the sequence.
        num_tokens: How many.
        is_again: Whether the request had tokens of an answer already.
    """

    start: float
    position: int
    num_tokens: int
    is_again: bool


@dataclass(frozen=True, slots=True)
class Generated(RequestEvent):
    """A step chose the next token of every sequence of a request.

    Attributes:
        num_tokens: One for each of its sequences.
        is_first: Whether these are its first.
        seconds: Since its tokens before, or since its arrival.
    """

    num_tokens: int
    is_first: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Preempted(RequestEvent):
    """A request lost its blocks to others and waits again.

    Attributes:
        num_preemptions: How often it did.
    """

    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Finished(RequestEvent):
    """A request is over; the last event of it, and the only one of a request that was rejected.

    Attributes:
        finish_reason: One of `FINISH_REASONS`.
        error: What went wrong, as text; None if nothing did.
        num_prompt_tokens, num_cached_tokens: Of the prompt, and those of it that the pool had.
        num_generated_tokens: Of all returned sequences.
        num_sequences: Sequences that its caller asked for.
        max_new_tokens: As allowed, per sequence.
        metrics: Its times.
        decode_time: Seconds from its first token to its last; 0 without any.
    """

    finish_reason: str
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_sequences: int
    max_new_tokens: int
    metrics: RequestMetrics
    decode_time: float


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """A step came to its end, or failed behind its forward.

    Attributes:
        start: When it began; `time` is its end.
        num_tokens: Computed in it.
        num_prompt_tokens: Those of them that are of prompts and were never computed before.
        num_cached_tokens: Prompt tokens of requests that run since this step and that the pool had.
        num_generated_tokens: Chosen in it.
        num_rows: Sequences that it computed something of.
        num_running, num_waiting: Requests behind it.
        blocks_in_use, num_blocks: Blocks of the pool that requests (of anybody) hold behind it, and in all.
    """

    start: float
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_rows: int
    num_running: int
    num_waiting: int
    blocks_in_use: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Idle(Event):
    """The batcher's thread (`start`) has nothing to do; about once per second.

    Attributes:
        blocks_in_use, num_blocks: As in `StepDone`.
    """

    blocks_in_use: int
    num_blocks: int


Observer = Callable[[Event], object]
"""Whatever can be called with an event; it looks at the event's type."""
