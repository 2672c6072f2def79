"""What scheduler and memory tell each other. Plain Python."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from .request import Chunk, Request


class Prefix(NamedTuple):
    """What the memory has of a waiting request's tokens.

    Attributes:
        num_cached: Tokens that need not be computed again.
        is_coming: A row scheduled in this very step computes the block behind them: one step later it is a hit.
        idle_blocks: Blocks of the cached tokens that are free as long as nobody takes them; None: all of them.
    """

    num_cached: int
    is_coming: bool
    idle_blocks: int | None = None


class Memory(Protocol):
    """Blocks, as far as the scheduler sees them: the engine implements it over the pool, the simulator over integers."""

    block_size: int

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""

    @property
    def num_free(self) -> int:
        """Blocks that could be allocated now, cached ones included."""

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a row of so many tokens holds, in all layer groups. One more token takes at most `blocks_for(1)`."""

    def growth(self, row: Any, num_tokens: int) -> int:
        """Most new blocks that computing so many more tokens of a row takes."""

    def look(self, request: Request) -> Prefix:
        """What there is of a waiting request's tokens. Changes nothing."""

    def admit(self, request: Request) -> None:
        """Gives the request's rows what there is of their tokens and sets their `num_computed`."""

    def expect(self, chunk: Chunk) -> None:
        """Is told of each prefill chunk of the step, so that `look` can say what is coming."""

    def release(self, request: Request) -> None:
        """Takes back all blocks of the request's rows and sets their `num_computed` to 0."""


@dataclass(slots=True)
class StepPlan:
    """What one step computes and who came and went for it.

    Attributes:
        chunks: Rows with one token to go first, then pieces of prompts; together within the token budget.
        admitted: Requests that run from this step on.
        preempted: Requests that lost their blocks and wait again.
    """

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


class SchedulerStats(NamedTuple):
    """What a scheduler did and believes.

    Attributes:
        num_arrived, num_admitted, num_preemptions: Requests, first admissions, and preemptions so far.
        num_waiting, num_running, num_running_seqs: Now.
        waiting_work: Seconds of a slot's time that the waiting requests are expected to need.
        step_cost: Seconds per step, per token, per token of K and V read, as fitted.
        correlation: Of predicted and actual work (Spearman, last 256 requests); None before there were enough.
    """

    num_arrived: int
    num_admitted: int
    num_preemptions: int
    num_waiting: int
    num_running: int
    num_running_seqs: int
    waiting_work: float
    step_cost: tuple[float, float, float]
    correlation: float | None


def requests_of(chunks: list[Chunk]) -> list[Request]:
    """Each once."""
    return list({id(chunk.request): chunk.request for chunk in chunks}.values())


def rest_of(request: Request, most: int) -> list[Chunk]:
    """What is left to compute of a running request's rows, at most so many tokens in all."""
    chunks = []
    for row in request.rows:
        count = min(row.num_tokens - row.num_computed, most)
        if count:
            chunks.append(Chunk(request, row, count))
            most -= count
    return chunks
