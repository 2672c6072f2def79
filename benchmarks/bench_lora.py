"""Requests for many adapters at once: this package's batcher against what peft's users do.

    python benchmarks/bench_lora.py
    python benchmarks/bench_lora.py --adapters 1 8 --rounds 1 --add
    python benchmarks/bench_lora.py --equal 128 32

Requests go round-robin to 1, 2, 4, 8 and 16 LoRA adapters (rank 16, all linear layers, random weights) on a random Llama. By
default their lengths are those of the Azure 2023 conversation trace, divided by `--factor`; with `--equal PROMPT NEW` all have the
same, so that padded batches compute nothing for nothing.

- `ours`: one `ContinuousBatcher.generate` with `adapter_names`.
- `groups`: `set_adapter` and a padded batch for the requests of each adapter.
- `mixed`: one padded batch, `generate(adapter_names=...)` of peft.
- `one`: ours, with the same requests all to one adapter.
- `active` and `base`: our batcher with one adapter that is simply active, and without any; beside one adapter.

Tokens are compared with those of `groups` for the same adapters (in float32, where nobody's may differ); whoever has others gets no
times, and if it is this package the benchmark fails.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import torch
from script import finish, make_results, parse, parser, progress

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.bench import models
from paged_cache.bench.measuring import Sample, Somebody, measure, same, timed
from paged_cache.bench.results import Goal, Line
from paged_cache.bench.workload import Workload, make_workload

QUICK = {"model": "tiny", "requests": 6, "adapters": [1, 3], "rounds": 1, "factor": 40.0}
BLOCK_SIZE = 16
OURS, ONE = "ours", "ours, one adapter"
ALL_OURS = (OURS, ONE, "active", "base")
EVERYBODY = ["groups", "mixed", OURS, "one", "active", "base"]
GOALS = [
    Goal("8 adapters cost hardly more than one", "elapsed_time", OURS, ONE, at_most=1.25, case={"adapters": 8}),
    Goal(
        "8 adapters twice as fast as peft's mixed batch",
        "elapsed_time",
        OURS,
        "mixed",
        at_most=0.5,
        case={"adapters": 8},
    ),
]
Tokens = list[list[int]]


def make_model(args: argparse.Namespace) -> Any:
    """A PeftModel with adapters "0", "1", ...; matrices of rank `--rank` and a size that shows in the tokens."""
    of = models.make_model(args.model, args.device, getattr(torch, args.dtype), args.seed)
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(of, config, adapter_name="0")
    for i in range(1, max(args.adapters)):
        model.add_adapter(str(i), config)
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.5 / args.rank**0.5)
    return model.eval()


class Contest:
    """Everybody who serves the workload."""

    def __init__(self, model: Any, workload: Workload) -> None:
        self.model, self.workload = model, workload

    def ours(self, names: list[str] | None) -> Tokens:
        """The batcher, with a pool of its own."""
        lengths = [len(x) + new for x, new in zip(self.workload.prompts, self.workload.num_new, strict=True)]
        num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
        pool = BlockPool.for_model(self.model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        limits: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 1024}
        with ContinuousBatcher(self.model, pool, **limits) as batcher:
            options: dict[str, Any] = {
                "max_new_tokens": self.workload.num_new,
                "do_sample": False,
                "progress_bar": False,
            }
            outputs = batcher.generate(self.workload.prompts, adapter_names=names, **options)
        return [output.generated_tokens for output in outputs]

    def active(self, names: list[str]) -> Tokens:
        """One adapter, as it always was."""
        self.model.set_adapter(names[0])
        return self.ours(None)

    def groups(self, names: list[str]) -> Tokens:
        """A padded batch for each adapter."""
        found: dict[int, list[int]] = {}
        for name in dict.fromkeys(names):
            self.model.set_adapter(name)
            places = [i for i, other in enumerate(names) if other == name]
            found |= zip(places, self._generate(places), strict=True)
        return [found[i] for i in range(len(names))]

    def mixed(self, names: list[str]) -> Tokens:
        """A padded batch for all."""
        return self._generate(range(len(names)), adapter_names=names)

    def _generate(self, places: Any, **options: Any) -> Tokens:
        """The new tokens of a batch, padded on the left, as long as its longest answer takes."""
        rows, num_new = ([of[i] for i in places] for of in (self.workload.prompts, self.workload.num_new))
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": max(num_new), "do_sample": False}
        outputs = self.model.generate(**inputs, **options)[:, length:].tolist()
        return [row[:n] for row, n in zip(outputs, num_new, strict=True)]


class Tellers:
    """Compares tokens with those of whoever served the same adapters first: `groups`, if it is there."""

    def __init__(self, is_exact: bool) -> None:
        self.is_exact = is_exact
        self._known: dict[tuple[str, ...], Tokens] = {}

    def check(self, found: tuple[tuple[str, ...], Tokens], _: Any) -> None:
        """Raises `Wrong`."""
        names, tokens = found
        expected = self._known.setdefault(names, tokens)
        if self.is_exact:
            same(tokens, expected)


def candidates(contest: Contest, count: int, only: list[str]) -> Iterator[Somebody]:
    """Who serves requests for so many adapters; `active` and `base` beside one adapter only, `one` beside several."""
    plans: dict[str, tuple[str, Any, int | None]] = {
        "groups": ("groups", contest.groups, count),
        "mixed": ("mixed", contest.mixed, count),
        "ours": (OURS, contest.ours, count),
    }
    plans |= {"one": (ONE, contest.ours, 1)} if count > 1 else {}
    plans |= {"active": ("active", contest.active, 1), "base": ("base", contest.ours, None)} if count == 1 else {}
    for key, (name, serve, num_adapters) in plans.items():
        if key in only:
            yield Somebody(name, partial(_serve, contest, serve, num_adapters))


def _serve(contest: Contest, serve: Callable[[list[str]], Tokens], num_adapters: int | None) -> Sample:
    """Requests go round to so many adapters, or to the model without any; the answer says to which."""
    places = range(len(contest.workload.prompts))
    names = ["__base__" if num_adapters is None else str(i % num_adapters) for i in places]
    sample = timed(partial(serve, names))()
    return Sample((tuple(names), sample.answer), sample.metrics)


def compare(args: argparse.Namespace, contest: Contest) -> list[Line]:
    """All numbers of adapters; each is served by everybody, first with two requests, which does not count."""
    people = {count: list(candidates(contest, count, args.only)) for count in args.adapters}
    is_exact, workload, lines = args.dtype == "float32", contest.workload, list[Line]()
    with progress((args.rounds + 1) * sum(map(len, people.values()))) as bar:
        for some, rounds in ((workload.first(2), 1), (workload, args.rounds)):
            contest.workload, tellers, lines = some, Tellers(is_exact), []
            for count, who in people.items():
                limits: dict[str, Any] = {"rounds": rounds, "warm_up": 0, "check": tellers.check}
                lines += measure(who, ALL_OURS, {"adapters": count}, **limits, tick=lambda _: bar.update())
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measures everybody with every number of adapters."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--model", choices=models.NAMES, default="28m")
    options.add_argument("--adapters", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--factor", type=float, default=5.0, help="by which the trace's lengths are divided")
    options.add_argument("--equal", nargs=2, type=int, metavar=("PROMPT", "NEW"), help="one length for all, no trace")
    options.add_argument("--only", nargs="+", choices=EVERYBODY, default=EVERYBODY)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32", help="only in float32 are equal tokens demanded")
    args = parse(options, arguments, __file__, QUICK)
    names = ["model", "rank", "requests", "factor", "equal", "device", "dtype"]
    parts: dict[str, Any] = {"columns": ["elapsed_time"], "compared": ["elapsed_time"], "ours": [OURS], "goals": GOALS}
    results = make_results(args, "lora", "Requests for many LoRA adapters at once", names, **parts)
    model = make_model(args)
    workload = make_workload(args.requests, args.factor, model.config.vocab_size, 0, args.seed)
    if args.equal:
        workload = Workload([(8 * x)[: args.equal[0]] for x in workload.prompts], [args.equal[1]] * args.requests)
    results.details = {"workload": workload.describe()}
    results.lines = compare(args, Contest(model, workload))
    finish(results, args)


if __name__ == "__main__":
    main()
