"""Where the time goes: parts of the batcher and of the model, timed one by one."""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.batching import processing
from paged_cache.bench.workload import Workload

from .ours import Ours

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
    with closing(Parts()) as parts, ours.batcher(workload) as batcher:
        _watch(parts, batcher, ours.model)
        ours.serve(batcher, workload)
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
    parts.watch(engine.outputs, "process", "requests and handles")
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


def describe(found: Profile) -> str:
    """A line per part, the longest first."""
    whole = sum(found.milliseconds.values())
    parts = sorted(found.milliseconds.items(), key=lambda item: -item[1])
    lines = [f"{name:36}{ms:10.3f} ms {ms / whole:7.1%}" for name, ms in parts]
    lines.append(f"{'bookkeeping':36}{whole * found.bookkeeping / 100:10.3f} ms {found.bookkeeping:6.1f}%")
    return "\n".join([f"\n{found.name}: {whole:.2f} ms", *lines])
