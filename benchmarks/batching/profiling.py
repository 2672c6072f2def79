"""Where the time of a step goes: a batcher with all its sequences running, parts of the step timed one by one."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paged_cache import BlockPool, ContinuousBatcher
from paged_cache.batching import processing

PROMPT, WARM_UP, STEPS = 64, 16, 200
MODEL, CHOOSING, REST = "model", "choosing tokens", "everything else"
WHOLE = "step"


@dataclass(frozen=True)
class Profile:
    """Medians over steps.

    Attributes:
        num_seqs: Sequences that ran.
        context: Tokens behind each of them, on average.
        milliseconds: By part; the parts of `bookkeeping` are in there, too.
        bookkeeping: Share of a step outside the model and the choice of tokens, in percent.
    """

    num_seqs: int
    context: float
    milliseconds: dict[str, float]
    bookkeeping: float


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

    def close(self) -> None:
        """Everything is as before."""
        for undo in reversed(self._undo):
            undo()


def profile(model: Any, num_seqs: int, num_steps: int = STEPS) -> Profile:
    """Steps of `num_seqs` requests, greedy, all of them decoding."""
    vocab_size, num_new = model.config.vocab_size, WARM_UP + num_steps + num_seqs
    prompts = [[(7 * i + 13 * j) % vocab_size for j in range(PROMPT)] for i in range(num_seqs)]
    num_blocks = num_seqs * (-(-(PROMPT + num_new) // 16) + 1)
    pool = BlockPool.for_model(model, num_blocks=num_blocks)
    parts = Parts()
    with ContinuousBatcher(model, pool, max_num_seqs=num_seqs) as batcher:
        for prompt in prompts:
            batcher.submit(prompt, max_new_tokens=num_new, do_sample=False)
        while batcher.stats().num_waiting or batcher.stats().num_running < num_seqs:
            batcher.step()
        for _ in range(WARM_UP):
            batcher.step()
        _watch(parts, batcher, model)
        try:
            for _ in range(num_steps):
                batcher.step()
                parts.end_step()
        finally:
            parts.close()
    return _profile(parts, num_seqs, PROMPT + WARM_UP + num_steps / 2)


def _watch(parts: Parts, batcher: Any, model: Any) -> None:
    engine = batcher._engine
    parts.watch(batcher, "step", "around a step")
    parts.watch(engine.scheduler, "schedule", "scheduling")
    parts.watch(engine.memory, "begin_step", "keys of prefixes")
    parts.watch(engine.forward, "_grow", "blocks and slots")
    parts.watch(engine.forward._manager, "commit_all", "prefix index")
    parts.watch(engine, "_execute", "inputs of the model")
    parts.watch(model, "forward", MODEL)
    parts.watch(processing, "choose", CHOOSING)
    parts.watch(engine.outputs, "process", "requests and handles")


def _profile(parts: Parts, num_seqs: int, context: float) -> Profile:
    names = sorted({name for step in parts.steps for name in step})
    medians = {name: 1e3 * statistics.median(step.get(name, 0.0) for step in parts.steps) for name in names}
    whole = sum(medians.values())
    bookkeeping = 100 * (whole - medians[MODEL] - medians[CHOOSING]) / whole
    return Profile(num_seqs, context, {WHOLE: whole, **medians}, bookkeeping)


def describe(found: Profile) -> str:
    """A line per part, the longest first."""
    whole = found.milliseconds[WHOLE]
    lines = [f"{found.num_seqs} sequences of {found.context:.0f} tokens on average, medians per step"]
    lines += [
        f"{name:24}{ms:8.3f} ms {ms / whole:7.1%}"
        for name, ms in sorted(found.milliseconds.items(), key=lambda item: -item[1])
    ]
    return "\n".join([*lines, f"{'bookkeeping':24}{whole * found.bookkeeping / 100:8.3f} ms {found.bookkeeping:6.1f}%"])
