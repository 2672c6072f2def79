"""Blocks that requests will hold at their peak, if they end when predicted. Plain Python."""

from typing import Any, NamedTuple

from .plan import Memory, Prefix
from .request import Request

LEAST_OVERRUN, OVERRUN = 8, 0.25


class Course(NamedTuple):
    """What a request does to the pool: it grows by `rate` blocks a step for `num_steps`, then gives back what it `held` and that."""

    num_steps: float
    rate: float
    held: float


def num_remaining(request: Request, num_generated: int) -> float:
    """Tokens per row that are still to come. A request beyond its prediction is believed to need a quarter more."""
    expected = request.predicted_tokens
    while expected <= num_generated:
        expected += max(LEAST_OVERRUN, OVERRUN * expected)
    return max(1.0, min(expected, request.max_new_tokens) - num_generated)


def peak(courses: list[Course], num_used: float) -> float:
    """Most blocks held at a time: usage can only be highest just before one of them ends."""
    highest, rate, freed = num_used, sum(course.rate for course in courses), 0.0
    for course in sorted(courses):
        num_steps, own_rate, held = course
        highest = max(highest, num_used + rate * num_steps - freed)
        rate -= own_rate
        freed += held
    return highest


class Forecast:
    """The future of the running requests, as of now; candidates are tried against it.

    Args:
        memory: What there is.
        running: Who holds blocks.
        headroom: Share of the blocks that the forecast must leave free.
    """

    def __init__(self, memory: Memory, running: list[Request], headroom: float) -> None:
        self._memory, self._limit = memory, memory.num_blocks * (1 - headroom)
        sizes = [self._sizes(request) for request in running]
        num_held = memory.num_blocks - memory.num_free
        # rows that begin alike hold blocks together: what one of them gives back is less than its table
        own = min(1.0, num_held / max(1, sum(computed for computed, _, _ in sizes)))
        self._courses = [
            self._course(request, known, own * known, length)
            for request, (_, known, length) in zip(running, sizes, strict=True)
        ]
        self._num_used = num_held + sum(known - computed for computed, known, _ in sizes)

    def fits(self, request: Request, prefix: Prefix) -> bool:
        """Whether a waiting request and all that run will find the blocks they need."""
        needed, course = self._candidate(request, prefix)
        return peak([*self._courses, course], self._num_used + needed) <= self._limit

    def add(self, request: Request, prefix: Prefix) -> None:
        """Counts a request among those that run."""
        needed, course = self._candidate(request, prefix)
        self._courses.append(course)
        self._num_used += needed

    def blocks_at_once(self, request: Request, prefix: Prefix, is_whole: bool) -> int:
        """Blocks that a request takes on admission: cached ones that were free, and those of its first piece, one token at least."""
        cached, known, _ = self._sizes(request, prefix.num_cached)
        idle = cached if prefix.idle_blocks is None else prefix.idle_blocks
        if is_whole:
            return idle + known - cached
        return idle if prefix.num_cached % self._memory.block_size else idle + self._memory.blocks_for(1)

    def _candidate(self, request: Request, prefix: Prefix) -> tuple[int, Course]:
        """Blocks until all its tokens are computed, and its course from then on."""
        cached, known, length = self._sizes(request, prefix.num_cached)
        needed = known - cached + (cached if prefix.idle_blocks is None else prefix.idle_blocks)
        return needed, self._course(request, known, needed, length)

    def _sizes(self, request: Request, num_cached: int | None = None) -> tuple[int, int, int]:
        """Blocks of the tokens that are computed, those of all tokens known, and the length of the longest row."""
        blocks_for, rows = self._memory.blocks_for, request.rows
        if num_cached is None and request.num_rows == 1:  # nearly always
            length, num_computed = rows[0].num_tokens, rows[0].num_computed
            known = blocks_for(length)
            return (known if length - num_computed <= 1 else blocks_for(num_computed)), known, length
        if not rows:
            length = request.num_prompt_tokens
            return blocks_for(num_cached or 0), blocks_for(length) + self._unborn(request, 0), length
        length = max(row.num_tokens for row in rows)
        computed = [self._computed(row, num_cached) for row in rows]
        known = sum(blocks_for(row.num_tokens) for row in rows) + self._unborn(request, len(rows))
        return sum(map(blocks_for, computed)), known, length

    @staticmethod
    def _computed(row: Any, num_cached: int | None) -> int:
        return int(row.num_computed) if num_cached is None else min(num_cached, row.num_tokens)

    def _unborn(self, request: Request, num_rows: int) -> int:
        """Blocks of its own that each row yet to be forked needs at once."""
        return (request.num_live - max(num_rows, 1)) * self._memory.blocks_for(1)

    def _course(self, request: Request, known: int, held: float, length: int) -> Course:
        num_steps = num_remaining(request, length - request.num_prompt_tokens)
        blocks_for, num_rows = self._memory.blocks_for, request.num_live
        now = known if num_rows == 1 else num_rows * blocks_for(length)
        return Course(num_steps, (num_rows * blocks_for(int(length + num_steps)) - now) / num_steps, held)
