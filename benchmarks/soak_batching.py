"""Very many random requests in a pool that is too small, some of them cancelled: each comes to exactly one end.

python benchmarks/soak_batching.py --num-prompts 10000
"""

import argparse
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.bench.models import make_model
from paged_cache.bench.results import Line, Results, environment

MAX_OPEN = 64  # requests that are under way at a time
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, NUM_BLOCKS = 16, 128, 32
CANCELLED, TIMED_OUT, TOO_LARGE, MISJUDGED, SAMPLED, COMPARED = (
    0.1,
    0.01,
    0.01,
    0.3,
    0.2,
    0.05,
)  # shares of all requests
PROMPT, NEW, SYSTEM = 80, 60, 48  # most tokens
OURS = {"seed", "timeout", "expected_tokens"}  # options that generate does not know
REASONS = {"length", "abort", "timeout", "rejected"}


@dataclass
class Ticket:
    """A request and what is known of it.

    Attributes:
        prompt, options: What was submitted.
        handle: The batcher's.
        num_ends: How often its listener was told of its end.
        cancel_after: Tokens after which it is cancelled; None: never.
    """

    prompt: list[int]
    options: dict[str, Any]
    handle: Any = None
    num_ends: int = 0
    cancel_after: int | None = None

    def listen(self, token: int | None) -> None:
        """Told of each token, and of the end with None."""
        self.num_ends += token is None


@dataclass
class Soak:
    """What is found; `problems` should be empty.

    Attributes:
        reasons: Requests by finish reason.
        num_compared: Requests whose tokens were compared with `generate`.
    """

    seconds: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_compared: int = 0
    grown_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Customers:
    """Makes requests at random, from a seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.vocab_size = vocab_size
        self.systems = [self._tokens(length) for length in (0, 0, SYSTEM // 2, SYSTEM)]

    def _tokens(self, count: int) -> list[int]:
        return self.random.choices(range(self.vocab_size), k=count)

    def next(self) -> Ticket:
        """Another one."""
        chance = self.random.random
        prompt = self.random.choice(self.systems) + self._tokens(self.random.randint(1, PROMPT))
        options: dict[str, Any] = {"max_new_tokens": self.random.randint(1, NEW)}
        if chance() < SAMPLED:
            options |= {"do_sample": True, "temperature": 0.9, "top_k": 20, "seed": self.random.randrange(2**31)}
        else:
            options["do_sample"] = False
        if chance() < TOO_LARGE:
            options["max_new_tokens"] = 10**6
        if chance() < MISJUDGED:  # too many are admitted, and some lose their blocks again
            options["expected_tokens"] = 1
        if chance() < TIMED_OUT:
            options["timeout"] = 1e-4
        after = self.random.randint(0, options["max_new_tokens"]) if chance() < CANCELLED else None
        return Ticket(prompt, options, cancel_after=after)


def soak(model: Any, count: int, seed: int) -> Soak:
    """Serves `count` requests with steps of the caller, cancels between them, and looks at everything at the end."""
    found, customers = Soak(), Customers(model.config.vocab_size, seed)
    pool = BlockPool.for_model(model, num_blocks=NUM_BLOCKS, block_size=16)
    process, start = psutil.Process(), time.perf_counter()
    before, done = process.memory_info().rss, list[Ticket]()
    limits: dict[str, Any] = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS}
    with ContinuousBatcher(model, pool, **limits) as batcher, tqdm(total=count, disable=None) as progress:
        under_way: list[Ticket] = []
        while len(done) < count:
            while len(under_way) < MAX_OPEN and len(done) + len(under_way) < count:
                under_way.append(_submit(batcher, customers.next()))
            batcher.step()
            found.num_steps += 1
            _cancel(under_way)
            ended = [ticket for ticket in under_way if ticket.handle.done]
            under_way = [ticket for ticket in under_way if not ticket.handle.done]
            done += ended
            progress.update(len(ended))
        found.num_preemptions = batcher.stats().num_preemptions
    found.seconds, found.grown_bytes = time.perf_counter() - start, process.memory_info().rss - before
    _judge(found, pool, done)
    _compare(found, model, [ticket for ticket in done if customers.random.random() < COMPARED])
    return found


def _submit(batcher: Any, ticket: Ticket) -> Ticket:
    ticket.handle = batcher.submit(ticket.prompt, **ticket.options)
    ticket.handle.add_listener(ticket.listen)
    return ticket


def _cancel(under_way: list[Ticket]) -> None:
    for ticket in under_way:
        if ticket.cancel_after is not None and len(ticket.handle.tokens) >= ticket.cancel_after:
            ticket.handle.cancel()


def _judge(found: Soak, pool: BlockPool, done: list[Ticket]) -> None:
    """Ends of requests, and the pool."""
    reasons: Counter[str] = Counter()
    for ticket in done:
        output = ticket.handle.result(timeout=0)
        reasons[output.finish_reason] += 1
        found.num_tokens += len(output.generated_tokens)
        if ticket.num_ends != 1:
            found.problems.append(f"{ticket.handle} came to {ticket.num_ends} ends")
        if output.finish_reason == "length" and len(output.generated_tokens) != ticket.options["max_new_tokens"]:
            found.problems.append(f"{ticket.handle} has {len(output.generated_tokens)} tokens")
    found.reasons = dict(reasons.most_common())
    if unexpected := set(reasons) - REASONS:
        found.problems.append(f"finish reasons {unexpected}")
    if not found.num_preemptions:
        found.problems.append("nobody was preempted: the pool is too large for this")
    pool.check()
    if pool.num_free != pool.num_blocks:
        found.problems.append(f"{pool.num_blocks - pool.num_free} blocks did not come back")


@torch.no_grad()
def _compare(found: Soak, model: Any, tickets: list[Ticket]) -> None:
    """What a request got is how `generate`'s answer begins, and all of it if the request was not cut short."""
    for ticket in tickets:
        output = ticket.handle.result(timeout=0)
        options = {name: value for name, value in ticket.options.items() if name not in OURS}
        num_new = options["max_new_tokens"] = len(output.generated_tokens)
        if num_new == 0:
            continue
        torch.manual_seed(ticket.options.get("seed", 0))
        ids = torch.tensor([ticket.prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(ticket.prompt) :]
        found.num_compared += 1
        if output.generated_tokens != expected.tolist():
            found.problems.append(f"{ticket.handle} has other tokens than generate: {ticket.options}")


def describe(found: Soak) -> str:
    """For people."""
    ends = ", ".join(f"{count} {reason}" for reason, count in found.reasons.items())
    return (
        f"{sum(found.reasons.values())} requests in {found.seconds:.1f} s, {found.num_steps} steps, {found.num_tokens} tokens: {ends};"
        f" {found.num_preemptions} preemptions; {found.num_compared} compared with generate;"
        f" the process grew by {found.grown_bytes / 2**20:.1f} MiB"
    )


def results_of(found: Soak, args: argparse.Namespace, command: str) -> Results:
    """In the format of all measurements."""
    counts = {name: [float(value)] for name, value in vars(found).items() if isinstance(value, int)}
    ends = {f"num_{reason}": [float(count)] for reason, count in found.reasons.items()}
    return Results(
        "batching_soak",
        "Very many random requests in a pool that is too small",
        command,
        environment(args.seed),
        {"model": args.model, "num_prompts": args.num_prompts, "num_blocks": NUM_BLOCKS},
        columns=["duration", *ends, "num_preemptions", "num_compared", "num_problems"],
        ours=["sjf"],
        lines=[
            Line(
                {"num_prompts": args.num_prompts},
                "sjf",
                {"duration": [found.seconds], **counts, **ends, "num_problems": [float(len(found.problems))]},
            )
        ],
        details={"problems": found.problems},
    )


def main(arguments: list[str] | None = None) -> None:
    """Exits with the problems, if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="as for `paged-cache bench throughput`")
    parser.add_argument("--num-prompts", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    logger = logging.getLogger("paged_cache")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each request that is rejected
    try:
        found = soak(make_model(args.model, seed=args.seed), args.num_prompts, args.seed)
    finally:
        logger.setLevel(level)
    print(describe(found))
    if args.output_json:
        typed = sys.argv[1:] if arguments is None else arguments
        results_of(found, args, " ".join(["python benchmarks/soak_batching.py", *typed])).save(args.output_json)
    if found.problems:
        raise SystemExit("\n".join([f"{len(found.problems)} problems:", *found.problems[:20]]))


if __name__ == "__main__":
    main()
