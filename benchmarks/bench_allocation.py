"""How far the blocks of a sequence lie apart in a pool that serves requests, and what finding them costs.

    python benchmarks/bench_allocation.py --slots 16 --room 1.15

Requests are those of the Azure 2023 conversation trace (paged_cache/bench/data/azure23_conv_256.csv), all at hand from the beginning, and
shuffled ones behind them. First come, first served: in each step every sequence in a slot gets its next token, a new one
its whole prompt. Bookkeeping is the real one, there are no keys and values. Tables are looked at every 50 steps, once a
third of the requests have come.
"""

import argparse
import csv
import itertools
import json
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import paged_cache
from paged_cache.bench.workload import TRACE
from paged_cache.memory.growth import Growth
from paged_cache.memory.manager import BlockManager
from paged_cache.memory.sequence import Sequence

FOLDER = Path(__file__).resolve().parent
SAMPLED = 50  # steps from one look at the tables to the next


class Request(NamedTuple):
    """Tokens of a prompt and of its answer."""

    prompt: int
    output: int


Step = dict[int, int]
"""The requests that are served, and how many tokens each of them brings."""


@dataclass(frozen=True)
class Allocation:
    """What became of a pool.

    Attributes:
        prefix_caching: Whether blocks stay findable; no two requests have tokens in common.
        num_blocks: Of the pool.
        peak: Most blocks in use at any time.
        highest: The same if all blocks below the highest one that was ever used counted.
        num_allocated: Blocks that sequences got, over all steps.
        blocks_per_table: Mean of the tables looked at.
        blocks_per_run: Mean length of their contiguous runs.
        extend_us: Microseconds in `extend`, per 1000 blocks that it gave.
    """

    prefix_caching: bool
    num_blocks: int
    peak: int
    highest: int
    num_allocated: int
    blocks_per_table: float
    blocks_per_run: float
    extend_us: float


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


def serve(requests: list[Request], slots: int, num_blocks: int, block_size: int, prefix_caching: bool) -> Allocation:
    """Serves all requests in one pool."""
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
    allocated = manager.allocator.counters.allocated
    lengths = num_seen / num_tables, num_seen / num_runs
    extend_us = 1e9 * server.seconds / allocated
    return Allocation(prefix_caching, num_blocks, peak, server.highest + 1, allocated, *lengths, extend_us)


def count_runs(table: list[int]) -> int:
    """Contiguous runs of a block table."""
    return 1 + sum(block != before + 1 for before, block in itertools.pairwise(table))


def environment(seed: int) -> dict[str, Any]:
    """What the numbers depend on."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version(), "paged_cache": paged_cache.__version__}
    return {"device": f"cpu, {platform.machine()}", "versions": versions, "commit": commit or None, "seed": seed}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--slots", type=int, default=16, help="sequences that are served at once")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--room", type=float, default=1.15, help="size of the pool, of the most blocks needed at a time"
    )
    parser.add_argument("--quick", action="store_true", help="few requests: does it run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "allocation.json")
    args = parser.parse_args(arguments)
    args.requests = 48 if args.quick else args.requests
    return args


def main(arguments: list[str] | None = None) -> None:
    """Prints a line without and one with prefix caching, and writes the JSON file."""
    args = parse(arguments)
    requests = read_requests(args.requests, args.seed)
    needed = needed_blocks(requests, args.slots, args.block_size)
    num_blocks = int(args.room * needed)
    mean = sum(map(sum, requests)) / len(requests)
    print(f"{len(requests)} requests of {mean:.0f} tokens on average, {args.slots} at once in {num_blocks} blocks")
    print(
        f"{'prefix caching':15} {'blocks per table':>17} {'per run':>8} {'highest / peak':>15} {'us per 1000 blocks':>19}"
    )
    pools = []
    for caching in (False, True):
        pool = serve(requests, args.slots, num_blocks, args.block_size, caching)
        cells = f"{pool.blocks_per_table:17.1f} {pool.blocks_per_run:8.1f} {pool.highest / pool.peak:15.3f}"
        print(f"{'on' if caching else 'off':15} {cells} {pool.extend_us:19.0f}")
        pools.append(asdict(pool))
    settings = {name: getattr(args, name) for name in ("slots", "block_size", "room")}
    result = environment(args.seed) | settings | {"num_requests": len(requests), "mean_tokens": mean, "needed": needed}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result | {"pools": pools}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
