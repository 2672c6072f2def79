"""What host memory for evicted blocks is worth: the same trace in the same small pool, with and without it.

    python benchmarks/bench_offload.py

- *preempted*: requests whose answers turn out longer than expected take blocks from each other all the time. A preempted
  one computes its tokens again, or gets its blocks back.
- *conversations*: turns of several conversations, one after the other, in a pool that holds few of them. A turn begins with
  all that was said before.

All tokens are compared with those of a pool that is large enough; the two are timed in turns.
"""

import argparse
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from script import finish, make_results, parse, parser

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.bench.measuring import Sample, Somebody, measure, same
from paged_cache.bench.models import make_model
from paged_cache.bench.results import Line
from paged_cache.demo import count_tokens

VOCABULARY = 256
WITHOUT, WITH = "without", "with host memory"
COLUMNS = ["elapsed_time", "num_computed", "num_preemptions", "offloaded", "restored"]
QUICK = {"model": "tiny", "block_size": 4, "rounds": 1, "offload": "16MiB"}
Tokens = list[list[int]]


@dataclass(frozen=True)
class Trace:
    """Prompts, and how they come.

    Attributes:
        num_new: Tokens of each answer.
        num_turns: How often each goes on with its answer and `num_said` more tokens; all at once where it is 1.
        num_blocks: Of the pool.
    """

    name: str
    prompts: Tokens
    num_new: int
    num_turns: int
    num_said: int
    num_blocks: int

    @property
    def longest(self) -> int:
        """Tokens of all prompts and answers together."""
        return sum(map(len, self.prompts)) + len(self.prompts) * self.num_turns * (self.num_new + self.num_said)


def traces(is_quick: bool, block_size: int, seed: int) -> list[Trace]:
    """The two workloads."""
    draw = random.Random(seed)

    def prompts(count: int, low: int, high: int) -> Tokens:
        return [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(low, high))] for _ in range(count)]

    if is_quick:
        return [
            Trace("preempted", prompts(8, 20, 40), 48, 1, 0, 200 // block_size),
            Trace("conversations", prompts(4, 40, 60), 4, 2, 8, 120 // block_size),
        ]
    return [
        Trace("preempted", prompts(20, 100, 200), 200, 1, 0, 3200 // block_size),
        Trace("conversations", prompts(6, 400, 600), 16, 3, 32, 1200 // block_size),
    ]


def serve(model: Any, trace: Trace, num_blocks: int, block_size: int, offload: str | None) -> Sample:
    """One run over a trace."""
    pool = BlockPool.for_model(model, num_blocks=num_blocks, block_size=block_size, offload_memory=offload)
    options = {"max_new_tokens": trace.num_new, "do_sample": False, "expected_tokens": 1}
    histories, answers = [list(prompt) for prompt in trace.prompts], []
    with ContinuousBatcher(model, pool, policy="fcfs") as batcher, count_tokens(model) as counts:
        start = time.perf_counter()
        for turn in range(trace.num_turns):
            groups = [histories] if trace.num_turns == 1 else [[history] for history in histories]
            for group in groups:
                for history, output in zip(group, batcher.generate(group, progress_bar=False, **options), strict=True):
                    answers.append(list(output.generated_tokens))
                    said = random.Random(turn * 1000 + len(answers))
                    history += answers[-1] + [said.randrange(1, VOCABULARY) for _ in range(trace.num_said)]
        seconds = time.perf_counter() - start
        num_preemptions = batcher.stats().num_preemptions
    stats, costs = pool.stats(), pool.manager.host.costs
    metrics = {"elapsed_time": seconds, "num_computed": sum(counts), "num_preemptions": num_preemptions}
    metrics |= {name: getattr(stats, name) for name in ("offloaded", "restored", "not_offloaded")}
    # 0 where nothing was measured
    metrics |= {"block_us": 1e6 * (costs.seconds_per_block or 0), "token_us": 1e6 * (costs.seconds_per_token or 0)}
    return Sample(answers, metrics)


def compare(model: Any, trace: Trace, args: argparse.Namespace) -> list[Line]:
    """One trace with and without host memory, in turns."""
    run = partial(serve, model, trace)
    enough = run(trace.longest // args.block_size + 100, args.block_size, None).answer
    pools = ((WITHOUT, None), (WITH, args.offload))
    people = [Somebody(name, partial(run, trace.num_blocks, args.block_size, memory)) for name, memory in pools]
    case = {"trace": trace.name, "requests": len(trace.prompts), "turns": trace.num_turns, "blocks": trace.num_blocks}
    return measure(
        people, [WITHOUT, WITH], case, rounds=args.rounds, warm_up=0, check=lambda found, _: same(found, enough)
    )


def main(arguments: list[str] | None = None) -> None:
    """Both traces."""
    options = parser(__doc__, rounds=2)
    options.add_argument("--model", default="28m", help="tiny, 28m, 8b or shipped")
    options.add_argument("--block-size", type=int, default=16)
    options.add_argument("--offload", default="1GiB", help="host memory")
    args = parse(options, arguments, __file__, QUICK)
    title = "Host memory for evicted blocks: the same trace in the same small pool, with it and without"
    parts: dict[str, Any] = {"columns": COLUMNS, "compared": ["elapsed_time", "num_computed"], "ours": [WITH]}
    results = make_results(args, "offload", title, ["model", "block_size", "offload"], **parts)
    model = make_model(args.model, seed=args.seed)
    for trace in traces(args.quick, args.block_size, args.seed):
        results.lines += compare(model, trace, args)
    finish(results, args)


if __name__ == "__main__":
    main()
