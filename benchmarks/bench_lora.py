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
- `active` and `base`: our batcher with one adapter that is simply active, and without any.

All tokens are compared with those of `groups` (in float32, where nobody's may differ); whoever has others gets no times, and if it is
this package the benchmark fails. One process, everybody in turns in every round, the order reversed in every second one; ratios are
those of single rounds.
"""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.bench import models
from paged_cache.bench.results import Spread
from paged_cache.bench.workload import Workload, make_workload
from paged_cache.bench.results import environment

OUTPUT = Path(__file__).resolve().parent / "results" / "lora.json"
QUICK = {"model": "tiny", "requests": 6, "adapters": [1, 3], "rounds": 1, "factor": 40.0}
JUDGED, MOST_OF_ONE, TIMES_MIXED = 8, 1.25, 2.0
"""Goals: what so many adapters may cost, of one; how many times as fast as peft's mixed batch."""
BLOCK_SIZE = 16
OURS = ("ours", "active", "base")
EVERYBODY = ["groups", "mixed", *OURS]
Tokens = list[list[int]]
Turns = dict[str, tuple[Callable[[Any], Tokens], list[str]]]
Times = dict[str, float]
"""Seconds of one round, by candidate and number of adapters, such as "ours 8"."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=models.NAMES, default="28m")
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--factor", type=float, default=5.0, help="by which the trace's lengths are divided")
    parser.add_argument("--equal", nargs=2, type=int, metavar=("PROMPT", "NEW"), help="one length for all, no trace")
    parser.add_argument("--only", nargs="+", choices=EVERYBODY, default=EVERYBODY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="only in float32 are equal tokens demanded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="to the rounds that the JSON file has, of equal settings")
    parser.add_argument("--quick", action="store_true", help="few short requests, a tiny model")
    parser.add_argument(
        "--output", type=Path, help=f"JSON file; by default {OUTPUT.name} in results/, with --quick none"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    if args.output is None and not args.quick:
        args.output = OUTPUT
    return args


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

    def base(self, names: list[str]) -> Tokens:
        """No adapter."""
        return self.ours(["__base__"] * len(names))

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


def turns(args: argparse.Namespace, contest: Contest) -> Turns:
    """Who serves the requests of how many adapters, by name; `active` and `base` once."""
    found: Turns = {}
    for count in args.adapters:
        names = [str(i % count) for i in range(args.requests)]
        kinds = [name for name in args.only if name != "active" or count == 1]
        for kind in (kind for kind in kinds if kind != "base"):
            found[f"{kind} {count}"] = (getattr(contest, kind), names)
    if "base" in args.only:
        found["base"] = (contest.base, ["0"] * args.requests)
    return found


def play(args: argparse.Namespace, who: Turns, is_odd: bool, tick: Callable[[], Any]) -> Times:
    """One round."""
    times: Times = {}
    tokens: dict[str, Tokens] = {}
    for name in sorted(who, reverse=is_odd, key=list(who).index):
        serve, adapters = who[name]
        gc.collect()
        start = time.perf_counter()
        tokens[name] = serve(adapters)
        times[name] = time.perf_counter() - start
        tick()
    for name in _wrong(who, tokens) if args.dtype == "float32" else ():
        print(f"{name}: other tokens than {_reference(who, name)}")
        if name.partition(" ")[0] in OURS:
            raise SystemExit(f"{name} has wrong tokens.")
        del times[name]
    return times


def _reference(who: Turns, name: str) -> str:
    """The first one that serves the same adapters."""
    count = name.partition(" ")[2]
    return next(other for other in who if other.partition(" ")[2] == count)


def _wrong(who: Turns, tokens: dict[str, Tokens]) -> list[str]:
    return [name for name in who if tokens[name] != tokens[_reference(who, name)]]


def ratios(rounds: list[Times]) -> dict[str, Spread]:
    """Times over times of the same round: of ours with several adapters over one, of the others over ours."""
    counts = sorted({int(name.split()[1]) for one in rounds for name in one if " " in name})
    pairs = [(f"ours {count}", "ours 1") for count in counts if count > 1]
    pairs += [("active 1", "base"), ("ours 1", "active 1")]
    pairs += [(f"{other} {count}", f"ours {count}") for other in ("groups", "mixed") for count in counts]
    both = {pair: [one for one in rounds if pair[0] in one and pair[1] in one] for pair in pairs}
    return {f"{a} / {b}": Spread.of(one[a] / one[b] for one in found) for (a, b), found in both.items() if found}


def verdicts(found: dict[str, Spread]) -> dict[str, bool]:
    """Goals whose ratio was measured, and whether they are met."""
    cost, gain = found.get(f"ours {JUDGED} / ours 1"), found.get(f"mixed {JUDGED} / ours {JUDGED}")
    goals = {}
    if cost is not None:
        goals[f"{JUDGED} adapters cost at most {MOST_OF_ONE} times one"] = cost.median <= MOST_OF_ONE
    if gain is not None:
        goals[f"{JUDGED} adapters at least {TIMES_MIXED} times as fast as mixed"] = gain.median >= TIMES_MIXED
    return goals


def report(rounds: list[Times]) -> None:
    """Tables for people."""
    names = list(dict.fromkeys(name for one in rounds for name in one))
    print(f"\n{len(rounds)} rounds: seconds, medians [least, most]")
    for name in names:
        print(f"  {name:12} {_text(Spread.of(one[name] for one in rounds if name in one))}")
    found = ratios(rounds)
    print("ratios of single rounds")
    for name, spread in found.items():
        print(f"  {name:24} {_text(spread)}")
    for goal, is_met in verdicts(found).items():
        print(f"{goal}: {'met' if is_met else 'MISSED'}")


def _text(spread: Spread) -> str:
    return f"{spread.median:6.2f} [{spread.min:.2f}, {spread.max:.2f}]"


def main(arguments: list[str] | None = None) -> None:
    """Prints tables and writes the JSON file."""
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    model = make_model(args)
    workload = make_workload(args.requests, args.factor, model.config.vocab_size, 0, args.seed)
    if args.equal:
        workload = Workload([(8 * x)[: args.equal[0]] for x in workload.prompts], [args.equal[1]] * args.requests)
    names = ("model", "rank", "requests", "factor", "equal", "device", "dtype", "threads", "seed")
    settings = {name: getattr(args, name) for name in names}
    rounds: list[Times] = []
    if args.add and args.output.exists():
        earlier = json.loads(args.output.read_text(encoding="utf-8"))
        if earlier["settings"] != settings:
            raise SystemExit(f"{args.output} has other settings: {earlier['settings']}, not {settings}")
        rounds = earlier["rounds"]
    found = {"device": f"{args.device}, {platform.machine()}", "load": os.getloadavg()[0], **environment(args.seed)}
    found |= {"workload": workload.describe(), "settings": settings}
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")

    contest = Contest(model, workload)
    contest.workload = workload.first(2)
    for serve, adapters in turns(args, contest).values():  # untimed
        serve(adapters[:2])
    contest.workload = workload
    who = turns(args, contest)
    with tqdm(total=args.rounds * len(who), unit="run", disable=None) as bar:
        for _ in range(args.rounds):
            rounds.append(play(args, who, bool(len(rounds) % 2), bar.update))
    report(rounds)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        follows = {name: vars(spread) for name, spread in ratios(rounds).items()}
        found |= {"rounds": rounds, "ratios": follows, "goals": verdicts(ratios(rounds))}
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
