"""A request as the scheduler sees it. Plain Python."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol


class Status(Enum):
    """Where a request is. From WAITING to RUNNING and, when it is preempted, back; FINISHED is for good."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Row:
    """One sequence of a request: a request has one, or several for beams and returned sequences.

    Attributes:
        tokens: Ids of the prompt and of what was generated.
        num_computed: How many of them have their K and V in the pool.
        sequence: The bookkeeping of its blocks; None while it has none.
        states: What else its computation goes on from, in models with linear attention.
    """

    tokens: list[int]
    num_computed: int = 0
    sequence: Any = None
    states: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens known; those that are not computed yet are what the next steps bring."""
        return len(self.tokens)


class Search(Protocol):
    """How the tokens of a request are chosen, and what was chosen so far.

    Attributes:
        prompt_ids: Token ids.
        num_rows: Sequences that are decoded at once.
        max_new_tokens: Most tokens of each.
        rows: All sequences, complete ones included; none before the first step, one until the prompt is computed.
        reasons: Why sequences are complete: "stop", "length", "timeout"; None while they are not.
        streamer: Gets tokens as they come; None if nothing does.
        sequences_scores, scores, logits: As `generate` returns them, if they were asked for.
    """

    prompt_ids: list[int]
    num_rows: int
    max_new_tokens: int
    rows: list[Row]
    reasons: list[str | None]
    streamer: Any
    sequences_scores: Any
    scores: Any
    logits: Any

    @property
    def is_complete(self) -> bool:
        """Whether every sequence is."""

    def begin(self) -> None:
        """The first token is about to be computed."""

    def sequences(self) -> list[list[int]]:
        """Generated tokens of each sequence."""

    def close(self) -> None:
        """Nothing more will be asked."""


@dataclass(eq=False)
class Request:
    """One prompt and what is to become of it.

    Attributes:
        request_id: Unique among the requests of a batcher.
        prompt_ids: Token ids.
        max_new_tokens: Most tokens that it generates, per row.
        num_rows: Sequences that it decodes at once. There is one row until the prompt is computed.
        cache_salt: Prefixes are only shared among requests of the same salt.
        adapter_name: Whose weights it is computed with, as the model calls it: "__base__" for none, None for the adapters
            that are active.
        asked_adapter: The same as its caller calls it.
        tenant: Whose it is (an adapter, a customer): lengths are predicted per tenant.
        priority: Lower is sooner.
        expected_tokens: The caller's own prediction of how many tokens it generates.
        deadline: When it is given up, on the batcher's clock.
        rows: Its sequences.
        status: See `Status`.
        arrival_time, admitted_time: On the batcher's clock; the first admission counts.
        cached_tokens: Prompt tokens that the pool had at the first admission.
        num_live: Rows that run or will run: all but the complete ones.
        num_preemptions: How often it lost its blocks.
        number: Arrivals of its priority before it.
        key: Its place in the order, smallest first; never changes.
        decoding: How its tokens are chosen; the engine's.
        handle: What its caller holds; the engine's.
        first_token_time, last_token_time: On the batcher's clock.
        num_prefilled: Tokens of the prompt that were cached or computed at least once, as far as anybody observes that.
        num_return_sequences: Sequences that its caller gets; fewer than rows if there are more beams.
        held: By the id of a row: logits that wait for those of its sisters.
        predicted_tokens, work: What the scheduler expected at arrival: tokens, and seconds of a slot's time.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    num_rows: int = 1
    cache_salt: Hashable = None
    adapter_name: str | None = None
    asked_adapter: str | None = None
    tenant: Hashable = None
    priority: int = 0
    expected_tokens: float | None = None
    deadline: float | None = None
    rows: list[Row] = field(default_factory=list)
    status: Status = Status.WAITING
    arrival_time: float = 0.0
    admitted_time: float | None = None
    cached_tokens: int = 0
    num_preemptions: int = 0
    number: int = -1
    key: float = 0.0
    decoding: Search = None  # type: ignore[assignment]  # a scheduler alone needs none
    handle: Any = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_prefilled: int = 0
    num_return_sequences: int = 1
    held: dict[int, Any] = field(default_factory=dict)
    predicted_tokens: float = 0.0
    work: float = 0.0
    num_live: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_live = self.num_rows

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)


class Chunk(NamedTuple):
    """Tokens of one row that a step computes: the next `num_tokens` behind `row.num_computed`."""

    request: Request
    row: Row
    num_tokens: int
