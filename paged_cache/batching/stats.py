"""A batcher at one moment."""

from dataclasses import dataclass

from .engine import Engine


@dataclass(frozen=True)
class BatcherStats:
    """Counts since the batcher was made, unless said otherwise.

    Attributes:
        forward: How steps are executed: "packed" (no padding), "padded", or "single" (one sequence at a time).
        policy: Who is next.
        num_waiting, num_running: Requests now; preempted ones wait.
        num_running_seqs: Sequences now.
        finished: Requests that are over, by finish reason.
        num_preemptions: Times that a request lost its blocks.
        num_steps: Steps.
        num_batched_tokens: Tokens computed, of prompts and of answers.
        num_generated_tokens: Tokens chosen.
        forward_seconds, step_seconds: Time in the model, and in all.
        blocks_in_use, peak_blocks_in_use, num_blocks: Blocks that requests (of anybody) hold now, at most so far after a
            step, and in all.
        prefix_queries, prefix_hits: Prompt tokens looked up in the pool, and those found, by all users of the pool.
        num_grouped_forwards, num_separate_forwards: Forwards of rows with adapters: of all plain LoRA together, and of one
            other adapter (DoRA, `modules_to_save`, ...), or of any in a model that runs padded.
        loaded_adapters: Registered adapters in memory now, the least recently used first.
        num_adapter_loads: Times that one was loaded from its folder.
    """

    forward: str
    policy: str
    num_waiting: int
    num_running: int
    num_running_seqs: int
    finished: dict[str, int]
    num_preemptions: int
    num_steps: int
    num_batched_tokens: int
    num_generated_tokens: int
    forward_seconds: float
    step_seconds: float
    blocks_in_use: int
    peak_blocks_in_use: int
    num_blocks: int
    prefix_queries: int
    prefix_hits: int
    num_grouped_forwards: int
    num_separate_forwards: int
    loaded_adapters: tuple[str, ...]
    num_adapter_loads: int

    @classmethod
    def of(cls, engine: Engine, num_pending: int) -> "BatcherStats":
        """The state of an engine; `num_pending` requests did not reach it yet."""
        scheduler, pool = engine.scheduler, engine.memory.pool
        counters = pool.manager.counters
        return cls(
            forward=engine.forward.name,
            policy=scheduler.policy.name,
            num_waiting=scheduler.num_waiting + num_pending,
            num_running=scheduler.num_running,
            num_running_seqs=scheduler.num_running_seqs,
            finished=dict(engine.finished),
            num_preemptions=scheduler.stats.num_preemptions,
            num_steps=engine.num_steps,
            num_batched_tokens=engine.num_tokens,
            num_generated_tokens=engine.outputs.num_generated,
            forward_seconds=engine.forward_seconds,
            step_seconds=engine.step_seconds,
            blocks_in_use=pool.num_blocks - pool.num_free,
            peak_blocks_in_use=engine.peak_blocks,
            num_blocks=pool.num_blocks,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            num_grouped_forwards=engine.forward.num_grouped,
            num_separate_forwards=engine.forward.num_separate,
            loaded_adapters=tuple(engine.adapters.loaded),
            num_adapter_loads=engine.adapters.num_loads,
        )

    def describe(self) -> str:
        """A few words: requests by what became of them."""
        over = [f"{count} {reason}" for reason, count in self.finished.items() if count]
        return ", ".join([f"{self.num_running} running", f"{self.num_waiting} waiting", *over])
