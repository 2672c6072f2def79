"""Where the batcher's time goes: parts of it and of the model, timed one by one.

    python benchmarks/profile_batching.py
    python benchmarks/profile_batching.py --model 28m --output-json results/profile_28m.json

First a step in which `--sequences` requests decode, then all of the requests of `paged-cache bench throughput`.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.batching import processing
from paged_cache.bench import models
from paged_cache.bench.results import Line, Results, environment
from paged_cache.bench.serving.comparing import CHECKED, Settings
from paged_cache.bench.serving.datasets import Dataset
from paged_cache.bench.serving.ours import Ours
from paged_cache.bench.workload import Workload

PROMPT, WARM_UP, STEPS = 64, 16, 200
LINEAR, ATTENTION, UPDATE, ROTARY = "linear layers", "attention", "cache update", "rotary embedding"
NORMS, MODEL, CHOOSING = "norms", "model, the rest", "choosing tokens"
IN_MODEL = (LINEAR, ATTENTION, UPDATE, ROTARY, NORMS, MODEL)


@dataclass(frozen=True)
class Profile:
    """What the time was spent on.

    Attributes:
        name: What was served.
        milliseconds: By part.
        bookkeeping: Share outside the model and the choice of tokens, in percent.
    """

    name: str
    milliseconds: dict[str, float]
    bookkeeping: float

    @classmethod
    def of(cls, name: str, milliseconds: dict[str, float]) -> "Profile":
        """Of the parts, which together are all there is."""
        inside = sum(milliseconds.get(part, 0.0) for part in (*IN_MODEL, CHOOSING))
        return cls(name, milliseconds, 100 * (1 - inside / sum(milliseconds.values())))


class Parts:
    """Seconds in some functions, per step; what one spends in another counts for the inner one only."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._step: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._undo: list[Callable[[], None]] = []

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Replaces a function of `owner` by one that takes its time."""
        function = getattr(owner, name)
        has_own = name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self._step[part] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, function) if has_own else delattr(owner, name))

    def end_step(self) -> None:
        """What comes then is another step."""
        self.steps.append(dict(self._step))
        self._step.clear()

    def names(self) -> set[str]:
        """Parts of all steps."""
        return {name for step in self.steps for name in step}

    def close(self) -> None:
        """Everything is as before."""
        for undo in reversed(self._undo):
            undo()


def profile_decoding(model: Any, num_seqs: int, num_steps: int) -> Profile:
    """Steps of `num_seqs` requests, greedy, all of them decoding; medians over steps."""
    num_new = WARM_UP + num_steps + num_seqs
    prompts = [[(7 * i + 13 * j) % model.config.vocab_size for j in range(PROMPT)] for i in range(num_seqs)]
    pool = BlockPool.for_model(model, num_blocks=num_seqs * (-(-(PROMPT + num_new) // 16) + 1))
    with ContinuousBatcher(model, pool, max_num_seqs=num_seqs) as batcher, closing(Parts()) as parts:
        for prompt in prompts:
            batcher.submit(prompt, max_new_tokens=num_new, do_sample=False)
        while batcher.stats().num_waiting or batcher.stats().num_running < num_seqs:
            batcher.step()
        for _ in range(WARM_UP):
            batcher.step()
        _watch(parts, batcher, model)
        for _ in range(num_steps):
            batcher.step()
            parts.end_step()
    medians = {name: 1e3 * statistics.median(step.get(name, 0.0) for step in parts.steps) for name in parts.names()}
    context = PROMPT + WARM_UP + num_steps // 2
    return Profile.of(f"a step of {num_seqs} sequences of {context} tokens, median of {num_steps}", medians)


def profile_workload(ours: Ours, workload: Workload) -> Profile:
    """All of `generate`."""
    options: dict[str, Any] = {"max_new_tokens": workload.num_new, "do_sample": False, "progress_bar": False}
    with closing(Parts()) as parts, ours.batcher(workload) as batcher:
        _watch(parts, batcher, ours.model)
        batcher.generate(workload.prompts, **options)
        steps = batcher.stats().num_steps
    parts.end_step()
    milliseconds = {name: 1e3 * seconds for name, seconds in parts.steps[0].items()}
    return Profile.of(f"{workload.describe()}, {steps} steps", milliseconds)


def _watch(parts: Parts, batcher: Any, model: Any) -> None:
    engine = batcher._engine
    parts.watch(batcher, "generate", "taking requests, returning outputs")
    parts.watch(engine, "step", "engine")
    parts.watch(engine.scheduler, "schedule", "scheduling")
    parts.watch(engine.memory, "begin_step", "keys of prefixes")
    parts.watch(engine, "_execute", "inputs of the model, tables, masks")
    parts.watch(engine.forward.inner, "_grow", "blocks and slots")
    parts.watch(engine.forward.inner._manager, "commit_all", "prefix index")
    parts.watch(processing, "choose", CHOOSING)
    for method in ("choose", "give"):
        parts.watch(engine.outputs, method, "requests and handles")
    parts.watch(model, "forward", MODEL)
    parts.watch(engine.forward.inner._cache, "update", UPDATE)
    code = sys.modules[type(model).__module__]
    if hasattr(code, "apply_rotary_pos_emb"):
        parts.watch(code, "apply_rotary_pos_emb", ROTARY)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            parts.watch(module, "forward", LINEAR)
        elif name.endswith("attn"):
            parts.watch(module, "forward", ATTENTION)
        elif "norm" in type(module).__name__.lower():
            parts.watch(module, "forward", NORMS)


def line(found: Profile) -> Line:
    """For results."""
    parts = sorted(found.milliseconds.items(), key=lambda item: -item[1])
    metrics = {f"{name.replace(',', '').replace(' ', '_')}_ms": [ms] for name, ms in parts}
    together = sum(found.milliseconds.values())
    return Line(
        {"served": found.name}, "sjf", {"together_ms": [together], "bookkeeping_percent": [found.bookkeeping]} | metrics
    )


def describe(found: Profile) -> str:
    """A line per part, the longest first."""
    whole = sum(found.milliseconds.values())
    parts = sorted(found.milliseconds.items(), key=lambda item: -item[1])
    lines = [f"{name:36}{ms:10.3f} ms {ms / whole:7.1%}" for name, ms in parts]
    lines.append(f"{'bookkeeping':36}{whole * found.bookkeeping / 100:10.3f} ms {found.bookkeeping:6.1f}%")
    return "\n".join([f"\n{found.name}: {whole:.2f} ms", *lines])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="as for `paged-cache bench throughput`; shipped, with --quick tiny")
    parser.add_argument("--sequences", type=int, default=32, help="that decode in a step")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--factor", type=float, default=5.0, help="by which the trace's lengths are divided")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few short requests, a tiny model")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args(arguments)
    args.model = args.model or ("tiny" if args.quick else models.SHIPPED)
    if args.quick:
        args.num_prompts, args.factor = 8, 20.0
    return args


def main(arguments: list[str] | None = None) -> None:
    """Prints the parts, and writes the JSON file if one is asked for."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(args.model, args.device, args.dtype, args.threads, args.seed)
    model = models.make_model(args.model, args.device, settings.torch_dtype, args.seed)
    dataset = Dataset(num_prompts=args.num_prompts, factor=args.factor)
    workload = dataset.make(model.config.vocab_size, 0, args.seed)
    served = Ours(model, "sjf", limits=settings.limits())
    served.serve(workload.first(CHECKED))
    known = settings.for_json() | dataset.settings() | {"sequences": args.sequences}
    results = Results(
        "batching_profile",
        "Where the batcher's time goes",
        " ".join(["python benchmarks/profile_batching.py", *(sys.argv[1:] if arguments is None else arguments)]),
        environment(args.seed, args.device),
        known,
        columns=["together_ms", "bookkeeping_percent", "linear_layers_ms", "attention_ms", "scheduling_ms"],
        ours=["sjf"],
    )
    profiles = [
        profile_decoding(model, args.sequences, 20 if args.quick else STEPS),
        profile_workload(served, workload),
    ]
    print(*map(describe, profiles), sep="\n")
    results.add(map(line, profiles))
    if args.output_json:
        results.save(args.output_json)


if __name__ == "__main__":
    main()
