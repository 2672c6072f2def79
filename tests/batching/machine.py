"""An engine for tests of the scheduler: blocks are numbers, the clock is set by hand, a step takes 10 ms."""

from paged_cache.batching.request import Status
from paged_cache.batching.scheduler import Scheduler
from tests.batching.integer_memory import IntegerMemory, IntRow


class Machine:
    """A scheduler, its memory and its clock; `step` is the engine's part."""

    def __init__(
        self, num_blocks=1000, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, prefixes=None, **options
    ):
        self.now = 0.0
        self.memory = IntegerMemory(num_blocks, block_size, prefixes)
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        self.scheduler = Scheduler(self.memory, clock=lambda: self.now, **limits, **options)
        self.admitted, self.ended = [], []

    def add(self, *requests):
        for request in requests:
            request.arrival_time = self.now
        self.scheduler.add(*requests)
        return requests

    def step(self, budget=None):
        """Computes one plan; requests whose tokens are all computed get one more per row, or end."""
        plan = self.scheduler.schedule(budget)
        self.admitted += plan.admitted
        for request, row, num_tokens in plan.chunks:
            assert request.status is Status.RUNNING
            assert 0 < num_tokens <= row.num_tokens - row.num_computed
            self.memory.compute(row, num_tokens)
        for request in {chunk.request: None for chunk in plan.chunks}:
            self.sample(request)
        self.now += 0.01
        return plan

    def sample(self, request):
        if any(row.num_computed < row.num_tokens for row in request.rows):
            return
        while len(request.rows) < request.num_live:  # copies all blocks, or none: then it is computed anew
            row = IntRow(request.rows[0].num_tokens)
            request.rows.append(row)
            if self.memory.growth(row, row.num_tokens) <= self.memory.num_free:
                self.memory.compute(row, row.num_tokens)
        for row in request.rows:
            row.num_tokens += 1
        if request.rows[0].num_tokens >= request.num_prompt_tokens + request.max_new_tokens:
            self.ended.append(request)
            self.scheduler.remove(request)
            self.scheduler.observe_output(request, request.max_new_tokens)

    def complete(self, request, row):
        """One of several rows ends before the others."""
        self.memory.release_row(row)
        request.rows.remove(row)
        self.scheduler.shrink(request)

    def run(self, limit=10_000):
        """Until nothing is left to do."""
        while self.scheduler.num_waiting or self.scheduler.num_running:
            assert self.step().chunks, "nothing gets on"
            limit -= 1
            assert limit, "it takes for ever"
        return self


def names(requests):
    return [request.request_id for request in requests]
