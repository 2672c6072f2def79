"""How far the blocks of a sequence lie apart in a pool that serves requests, and what finding them costs.

    python benchmarks/bench_allocation.py --slots 16 --room 1.15

Requests are those of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv), all at hand from the beginning, and
shuffled ones behind them. First come, first served: in each step every sequence in a slot gets its next token, a new one
its whole prompt. Bookkeeping is the real one, there are no keys and values. Tables are looked at every 50 steps, once a
third of the requests have come.
"""

import csv
import itertools
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from script import finish, make_results, parse, parser

from paged_cache.bench.measuring import Sample, Somebody, measure
from paged_cache.bench.workload import TRACE
from paged_cache.memory.growth import Growth
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.sequence import Sequence

SAMPLED = 50  # steps from one look at the tables to the next
COLUMNS = ["blocks_per_table", "blocks_per_run", "highest_over_peak", "extend_1000_blocks_us"]
WITHOUT, WITH = "without prefix caching", "with prefix caching"


class Request(NamedTuple):
    """Tokens of a prompt and of its answer."""

    prompt: int
    output: int


Step = dict[int, int]
"""The requests that are served, and how many tokens each of them brings."""


def read_requests(count: int, seed: int) -> list[Request]:
    """The trace, then the trace in other orders, until there are enough."""
    with TRACE.open() as lines:
        trace = [Request(int(row["prompt"]), int(row["output"])) for row in csv.DictReader(lines)]
    requests, order = list(trace), random.Random(seed)
    while len(requests) < count:
        requests += order.sample(trace, len(trace))
    return requests[:count]


def steps(requests: list[Request], slots: int) -> Iterator[Step]:
    """Who is served in each step; a request's last token is never stored."""
    left: dict[int, int] = {}
    waiting = iter(range(len(requests)))
    while True:
        new = list(itertools.islice(waiting, slots - len(left)))
        step = dict.fromkeys(left, 1) | {i: requests[i].prompt for i in new}
        if not step:
            return
        yield step
        left |= {i: requests[i].output for i in new}
        left = {i: count - 1 for i, count in left.items() if count > 1}


def needed_blocks(requests: list[Request], slots: int, block_size: int) -> int:
    """The most that all sequences of a step fill."""
    most, lengths = 0, [0] * len(requests)
    for step in steps(requests, slots):
        for i, count in step.items():
            lengths[i] += count
        most = max(most, sum(-(-lengths[i] // block_size) for i in step))
    return most


class Server:
    """Takes the steps of a trace in a pool.

    Attributes:
        manager: The pool's bookkeeping.
        seconds: Spent in `extend` so far.
        highest: The highest block that a finished sequence had.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, [None], prefix_caching)
        self.seconds = 0.0
        self.highest = 0
        self._running: dict[int, Sequence] = {}
        self._num_tokens = 0

    def take(self, step: Step) -> None:
        """Sequences that the step does not name have ended."""
        for i in self._running.keys() - step.keys():
            self._finish(i)
        for i in step.keys() - self._running.keys():
            self._running[i] = self.manager.new_sequence("no adapter")
        growths = [Growth(self._running[i], count, self._tokens(count)) for i, count in step.items()]
        start = time.perf_counter()
        self.manager.extend(growths)
        self.seconds += time.perf_counter() - start
        for growth in growths:
            self.manager.commit(growth.sequence)

    def tables(self) -> list[list[int]]:
        """Of the sequences in slots."""
        return [sequence.tables[0] for sequence in self._running.values()]

    def close(self) -> None:
        """All sequences end."""
        for i in list(self._running):
            self._finish(i)

    def _finish(self, request: int) -> None:
        sequence = self._running.pop(request)
        self.highest = max(self.highest, *sequence.tables[0])
        self.manager.release(sequence)

    def _tokens(self, count: int) -> list[int] | None:
        """Ids that no other token has, where anybody asks for them."""
        if not self.manager.prefix_caching:
            return None
        self._num_tokens += count
        return list(range(self._num_tokens - count, self._num_tokens))


def serve(requests: list[Request], slots: int, num_blocks: int, block_size: int, prefix_caching: bool) -> Sample:
    """Serves all requests in one pool; no two of them have tokens in common.

    Returns:
        The answer is the number of blocks that sequences got, over all steps. Metrics: `num_blocks` of the pool; most
        blocks in use (`peak_blocks`), and the same if all below the highest that was ever used counted
        (`highest_blocks`); the mean of the tables looked at, and of their contiguous runs; time in `extend`.
    """
    server = Server(num_blocks, block_size, prefix_caching)
    manager, peak, num_tables, num_seen, num_runs = server.manager, 0, 0, 0, 0
    for number, step in enumerate(steps(requests, slots)):
        server.take(step)
        peak = max(peak, num_blocks - manager.num_free)
        if number % SAMPLED == 0 and max(step) >= len(requests) // 3:
            tables = server.tables()
            num_tables += len(tables)
            num_seen += sum(map(len, tables))
            num_runs += sum(map(count_runs, tables))
    server.close()
    manager.check()
    allocated, highest = manager.allocator.counters.allocated, server.highest + 1
    counts: dict[str, float] = {
        "num_blocks": num_blocks,
        "peak_blocks": peak,
        "highest_blocks": highest,
        "num_allocated": allocated,
    }
    counts |= {"blocks_per_table": num_seen / num_tables, "blocks_per_run": num_seen / num_runs}
    times = {"highest_over_peak": highest / peak, "extend_1000_blocks_us": 1e9 * server.seconds / allocated}
    return Sample(allocated, counts | times)


def count_runs(table: list[int]) -> int:
    """Contiguous runs of a block table."""
    return 1 + sum(block != before + 1 for before, block in itertools.pairwise(table))


def main(arguments: list[str] | None = None) -> None:
    """Serves them without and with prefix caching."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--requests", type=int, default=600)
    options.add_argument("--slots", type=int, default=16, help="sequences that are served at once")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument(
        "--room", type=float, default=1.15, help="size of the pool, of the most blocks needed at a time"
    )
    args = parse(options, arguments, __file__, {"requests": 48, "rounds": 1})
    requests = read_requests(args.requests, args.seed)
    needed = needed_blocks(requests, args.slots, args.block_size)
    mean = sum(map(sum, requests)) / len(requests)
    title = (
        f"Allocation: how far the blocks of a sequence lie apart, {args.slots} of {args.requests} requests at a time"
    )
    names = ["requests", "slots", "block_size", "room"]
    results = make_results(args, "allocation", title, names, columns=COLUMNS, ours=[WITHOUT, WITH])
    results.details = {"mean_tokens": mean, "needed": needed}
    serve_in = partial(serve, requests, args.slots, int(args.room * needed), args.block_size)
    pools = [Somebody(name, partial(serve_in, is_caching)) for name, is_caching in ((WITHOUT, False), (WITH, True))]
    results.lines = measure(pools, results.ours, {"requests": args.requests}, rounds=args.rounds, warm_up=0)
    finish(results, args)


if __name__ == "__main__":
    main()
