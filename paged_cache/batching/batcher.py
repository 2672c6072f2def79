"""`ContinuousBatcher`: many requests on one model and one pool."""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from ..cache import PagedCache
from ..errors import InvalidRequestError, PagedCacheError
from ..pool import BlockPool
from ..pool_map import PoolMap, pool_map
from .adapter_forward import AdapterForward
from .adapter_store import AdapterStore
from .engine import Engine
from .events import Observer
from .forwards import choose_forward
from .handle import RequestHandle, cancelling
from .inputs import InputProcessor
from .intake import Intake
from .loop import EngineLoop
from .options import RequestOptions, per_prompt
from .output import RequestOutput
from .policy import Policy
from .pool_memory import PoolMemory, rows_with_blocks
from .progress import Progress
from .scheduler import Scheduler
from .serving import hold_for, limits_for, require_different, require_limits, require_observers, require_served
from .stats import BatcherStats
from .stats_logger import StatsLogger, log_interval

AnyObserver = TypeVar("AnyObserver", bound=Observer)


class ContinuousBatcher:
    """Serves many requests at once: sequences join and leave the batch at every step.

    Each request gets the tokens that `model.generate` gives for it alone. Whoever calls `generate`, `step`, or waits for a
    handle does the work, unless a thread of the batcher does (`start`). The model is patched until `close`.

    Args:
        model: A `PreTrainedModel` that generates text, or a `PeftModel` around one, in evaluation mode.
        pool: Its pool, `BlockPool.for_model(model, ...)`.
        policy: Who is next: "sjf" (shortest job first, with aging), "fcfs", "sjf-no-aging", "hrrn", or a `Policy`.
        max_num_seqs: Sequences that run at once; by default 32 on a CPU, 256 on a GPU.
        max_num_batched_tokens: Tokens computed in one step, longer prompts are cut; by default 512 and 8192.
        max_queue_size: Requests that may wait; more are rejected. None for any number.
        tokenizer: For prompts of text or chat messages, `stop_strings`, and `RequestOutput.text`.
        lora_modules: Folders of adapters by name, loaded when they are first asked for; see `register_adapter`.
        max_loras: Different adapters that run at once, and most of `lora_modules` in memory; None for any number.
        observers: Called with what happens; see `observe`.
        log_stats: Logs a line on throughput, queue and pool every five seconds, or every so many; see `StatsLogger`.
        prepack_weights: On a CPU, linear layers are faster for a second copy of their weights; see `prepack_weights`.
        clock: Seconds, for deadlines, aging and metrics.

    Raises:
        UnsupportedModelError: The model generates no text from tokens alone.
        InvalidRequestError: The pool is another model's, or a limit makes no sense.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        pool: BlockPool,
        *,
        policy: str | Policy = "sjf",
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_queue_size: int | None = None,
        tokenizer: Any = None,
        lora_modules: Mapping[str, str | Path] | None = None,
        max_loras: int | None = None,
        observers: Iterable[Observer] = (),
        log_stats: bool | float = False,
        prepack_weights: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        inner = require_served(model, pool)
        interval = log_interval(log_stats)
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        require_limits(tokenizer, max_queue_size=max_queue_size, max_loras=max_loras, **limits)
        told = require_observers(observers)
        self._adapters = AdapterStore(model, pool, max_loras)
        self._adapters.register(lora_modules or {})
        self.pool, self.max_queue_size, self.max_loras = pool, max_queue_size, max_loras
        self._unpatch = weakref.finalize(self, hold_for(model, prepack_weights))
        try:
            chosen: Any = choose_forward(model if hasattr(model, "_orig_mod") else inner, pool)
            direct = type(chosen)(inner, pool) if hasattr(model, "_orig_mod") else chosen
            forward = AdapterForward(chosen, direct, pool)
            self._memory = PoolMemory(pool, forward.name == "packed", self._adapters)
            scheduler = Scheduler(
                self._memory,
                policy=policy,
                clock=clock,
                whole_prompts=forward.whole_prompts,
                max_loras=max_loras,
                **limits_for(pool.device.type, limits),
            )
        except BaseException:
            self._unpatch()
            raise
        self._inputs = InputProcessor(inner, tokenizer, clock, self._adapters)
        self._engine = Engine(forward, self._memory, scheduler, self._adapters, clock, tokenizer)
        self._loop = EngineLoop(self._engine, max_queue_size)
        self._loop.end_with(self)
        self._intake = Intake(self._inputs, self._engine, self._loop)
        loggers: list[Observer] = [] if interval is None else [StatsLogger(interval)]
        for observer in [*told, *loggers]:
            self._engine.reports.add(observer)

    def generate(
        self,
        prompts: Any,
        generation_config: Any = None,
        *,
        adapter_names: Any = None,
        attention_mask: Any = None,
        progress_bar: bool = True,
        **generate_kwargs: Any,
    ) -> list[RequestOutput]:
        """Generates for all prompts and returns when all are over.

        Args:
            prompts: A list with token ids, tensors, strings or chat messages, mixed as you like; a tensor `[batch, length]`
                with `attention_mask`; or what a tokenizer returns.
            generation_config: As for `model.generate`; a list has one for each prompt.
            adapter_names: One adapter for each prompt, or one for all; see `submit`.
            attention_mask: `[batch, length]`, 0 for padding, if prompts are a tensor.
            progress_bar: Shows a bar on a terminal.
            **generate_kwargs: As for `model.generate`, and those of `submit`. A list has one for each prompt,
                `max_new_tokens=[20, 500]`, but for options that are lists by nature (`eos_token_id`, `stop_strings`, ...).

        Returns:
            One output per prompt, in their order. A prompt that cannot be served has finish reason "rejected".

        Raises:
            InvalidRequestError, ValueError, TypeError: An option that is wrong or cannot be honoured; nothing was begun.
        """
        options = {"generation_config": generation_config, **generate_kwargs}
        if adapter_names is not None:
            if options.pop("adapter_name", None) is not None:
                raise InvalidRequestError("adapter_names and adapter_name are given: leave the latter out.")
            options["adapter_names"] = adapter_names
        handles = self.submit_all(prompts, attention_mask=attention_mask, **options)
        with Progress(len(handles), progress_bar, self.stats) as progress, cancelling(handles):
            self._loop.wait(lambda: progress.count(handles) == len(handles))
        return [handle.result() for handle in handles]

    def submit_all(self, prompts: Any, *, attention_mask: Any = None, **options: Any) -> list[RequestHandle]:
        """Hands many requests in, all or none of them; see `generate` for prompts and options.

        Waits while the queue is full. A prompt that cannot be served has a handle, too, with finish reason "rejected".
        """
        return self._submit_all(lambda: False, prompts, attention_mask, options)

    def _submit_all(
        self, is_left: Callable[[], bool], prompts: Any, attention_mask: Any, options: dict[str, Any]
    ) -> list[RequestHandle]:
        """Gives up, and ends the requests, if it `is_left` while the queue is full."""
        self._require_open()
        items = self._inputs.read_all(prompts, attention_mask, options)
        pairs = enumerate(zip(items, per_prompt(options, len(items)), strict=True))
        requests = [self._intake.make_one_of_many(*pair, f"prompt {i}: ", self) for i, pair in pairs]
        require_different(requests)
        handles: list[RequestHandle] = [request.handle for request in requests]
        with cancelling(handles):
            for request in requests:
                while not self._intake.enter(request):
                    self._loop.wait(lambda: is_left() or self._loop.has_room())
                    if is_left():
                        raise PagedCacheError("nobody waits for these requests any more.")
        return handles

    def submit(
        self,
        prompt: Any,
        generation_config: Any = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        seed: int | None = None,
        cache_salt: Any = None,
        tenant: Any = None,
        expected_tokens: float | None = None,
        adapter_name: str | None = None,
        **generate_kwargs: Any,
    ) -> RequestHandle:
        """Hands a request in and returns at once; from any thread.

        Args:
            prompt: Token ids, a tensor, a string or chat messages.
            generation_config: As for `model.generate`.
            request_id: A name of your own; made if there is none.
            priority: Lower is sooner, whatever the policy says within one priority.
            timeout: Seconds from now after which it ends with finish reason "timeout".
            seed: Of its random numbers: sampling gives what `generate` gives after `torch.manual_seed(seed)`.
            cache_salt: Prefixes are only shared among requests of the same salt.
            tenant: Lengths of answers are predicted per tenant.
            expected_tokens: Your own prediction of how many tokens it generates.
            adapter_name: One of peft's adapters in the model, or of `lora_modules`; "__base__" for none of them. By default
                those that are active in each step.
            **generate_kwargs: As for `model.generate`.

        Raises:
            InvalidRequestError, ValueError, TypeError: The prompt or an option is wrong or cannot be honoured.
            PagedCacheError: The batcher is closed.
        """
        self._require_open()
        options = RequestOptions(request_id, priority, timeout, seed, cache_salt, tenant, expected_tokens, adapter_name)
        request = self._intake.make(prompt, options, generation_config, generate_kwargs, self)
        if not self._intake.enter(request):
            waiting = f"{self._loop.num_waiting} requests wait, max_queue_size is {self.max_queue_size}"
            self._loop.reject(request, InvalidRequestError(f"the queue is full: {waiting}."))
        handle: RequestHandle = request.handle
        return handle

    def step(self) -> bool:
        """Executes one step; whether requests are left that are not over."""
        self._loop.step()
        return self._loop.has_work

    def stats(self) -> BatcherStats:
        """What is under way and what was done so far."""
        return BatcherStats.of(self._engine, len(self._loop.pending))

    def pool_map(self, caches: Mapping[str, PagedCache] | None = None) -> PoolMap:
        """What every block is used for, between two steps; rows have their request's id. See `observability.save_pool_map`.

        Raises:
            PagedCacheError: Called from inside a step.
        """
        return self._loop.between_steps(lambda: pool_map(self.pool, caches, rows_with_blocks(self._engine.requests)))

    def observe(self, observer: AnyObserver) -> AnyObserver:
        """Calls `observer` with each `observability.Event` from now on, and returns it.

        Events come in order and one at a time, behind the step that they happened in, from the thread that did it. An
        observer may submit and cancel requests but not wait for them. One that raises is called no more.

        Raises:
            InvalidRequestError: It cannot be called.
        """
        self._engine.reports.add(*require_observers([observer]))
        return observer

    def stop_observing(self, observer: Observer) -> None:
        """Calls `observer` no more."""
        self._engine.reports.remove(observer)

    def register_adapter(self, name: str, path: str | Path) -> None:
        """Requests may name the adapter in this folder from now on; it is loaded when the first of them runs.

        Raises:
            InvalidRequestError: The name is taken, or the folder holds no adapter.
        """
        self._adapters.register({name: path})

    def drop_adapter(self, name: str) -> None:
        """No new request may name a registered adapter; it leaves memory with the last one that does.

        Raises:
            InvalidRequestError: No adapter of this name was registered.
        """
        self._adapters.drop(name)
        self._loop.do(self._adapters.sweep)

    def start(self) -> "ContinuousBatcher":
        """From now on a thread of the batcher does the work, until `close`."""
        self._require_open()
        self._loop.start()
        return self

    def close(self) -> None:
        """Ends what is not over with finish reason "abort", gives all blocks back, and leaves the model as it was."""
        self._loop.stop()
        try:
            self._adapters.close()
        finally:
            self._unpatch()

    def __enter__(self) -> "ContinuousBatcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._loop.is_over else self.stats().describe()
        return f"ContinuousBatcher({type(self._inputs.model).__name__}, {state})"

    def _require_open(self) -> None:
        if self._loop.is_over:
            raise PagedCacheError("this batcher is closed: make a new one, ContinuousBatcher(model, pool).")
