"""`AsyncContinuousBatcher`: the batcher for asyncio, over one background thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..pool import BlockPool
from .batcher import AnyObserver, ContinuousBatcher
from .events import Observer
from .handle import RequestHandle
from .output import RequestOutput
from .progress import REFRESH_SECONDS, Progress
from .stats import BatcherStats


class AsyncRequestHandle:
    """`async for` tokens, `await handle.result()`, or `cancel` it; see `RequestHandle`.

    A task that is cancelled while it waits takes its request with it, so that nobody computes for a client who left. Leaving
    `async for` by `break` does not: the request goes on until it is over or `cancel` is called.
    """

    def __init__(self, handle: RequestHandle) -> None:
        self._handle, self._loop = handle, asyncio.get_running_loop()
        self._changed = asyncio.Event()
        handle.add_listener(self._notify)

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self._handle.request_id

    @property
    def tokens(self) -> list[int]:
        """What there is so far."""
        return self._handle.tokens

    @property
    def done(self) -> bool:
        """Whether the request is over."""
        return self._handle.done

    async def __aiter__(self) -> AsyncIterator[int]:
        """Tokens of the first sequence, as they are chosen.

        Raises:
            Exception: What ended the request, if it was an error.
        """
        count = 0
        while not self._handle.done or count < len(self._handle.tokens):
            await self._wait(count)
            fresh = self._handle.tokens[count:]
            count += len(fresh)
            for token in fresh:
                yield token
        output = self._handle.result()
        if output.error is not None:
            raise output.error

    async def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the end.

        Args:
            timeout: Seconds to wait at most; the request goes on.

        Raises:
            TimeoutError: It was not over by then.
        """
        end = None if timeout is None else self._loop.time() + timeout
        while not self._handle.done:
            left = None if end is None else end - self._loop.time()
            if left is not None and left <= 0:
                raise TimeoutError(f"not within {timeout} seconds; the request goes on.")
            await self._wait(len(self._handle.tokens), left)
        return self._handle.result()

    def cancel(self) -> None:
        """Ends the request with finish reason "abort", unless it is over; does not wait for it."""
        self._loop.run_in_executor(None, self._handle.cancel)

    async def _wait(self, count: int, timeout: float | None = None) -> None:
        """Until the request is over or has more than `count` tokens, or time is up."""
        self._changed.clear()
        if self._handle.done or len(self._handle.tokens) > count:
            return
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except (TimeoutError, asyncio.TimeoutError):
            return

    def _notify(self, token: int | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


class AsyncContinuousBatcher:
    """`ContinuousBatcher` for asyncio: `async with AsyncContinuousBatcher(model, pool) as batcher: ...`.

    Args:
        model, pool: As for `ContinuousBatcher`.
        **options: Likewise.
    """

    def __init__(self, model: torch.nn.Module, pool: BlockPool, **options: Any) -> None:
        self._batcher = ContinuousBatcher(model, pool, **options).start()

    async def submit(self, prompt: Any, generation_config: Any = None, **options: Any) -> AsyncRequestHandle:
        """Hands a request in; see `ContinuousBatcher.submit`. Cancelled, it ends it."""
        (handle,) = await _hand_in(lambda is_left: [self._batcher.submit(prompt, generation_config, **options)])
        return AsyncRequestHandle(handle)

    async def generate(
        self,
        prompts: Any,
        generation_config: Any = None,
        *,
        attention_mask: Any = None,
        progress_bar: bool = False,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generates for all prompts; see `ContinuousBatcher.generate`. Cancelled, it ends its requests.

        Here `progress_bar` has to be asked for: many tasks may be generating at once.
        """
        options = {"generation_config": generation_config, **options}
        handles = await _hand_in(lambda is_left: self._batcher._submit_all(is_left, prompts, attention_mask, options))
        try:
            async with _progress(handles, self.stats) if progress_bar else nullcontext():
                return await asyncio.gather(*[AsyncRequestHandle(handle).result() for handle in handles])
        except BaseException:
            _cancel_soon(handles)
            raise

    async def register_adapter(self, name: str, path: str | Path) -> None:
        """Requests may name the adapter in this folder from now on; see `ContinuousBatcher.register_adapter`."""
        await asyncio.to_thread(self._batcher.register_adapter, name, path)

    async def drop_adapter(self, name: str) -> None:
        """No new request may name a registered adapter; see `ContinuousBatcher.drop_adapter`."""
        await asyncio.to_thread(self._batcher.drop_adapter, name)

    @property
    def batcher(self) -> ContinuousBatcher:
        """The batcher underneath: for observers, and for threads that do not run the event loop."""
        return self._batcher

    def observe(self, observer: AnyObserver) -> AnyObserver:
        """Calls `observer` with each event, in the batcher's thread; see `ContinuousBatcher.observe`."""
        return self._batcher.observe(observer)

    def stop_observing(self, observer: Observer) -> None:
        """Calls `observer` no more."""
        self._batcher.stop_observing(observer)

    def stats(self) -> BatcherStats:
        """What is under way and what was done so far."""
        return self._batcher.stats()

    async def close(self) -> None:
        """Ends what is not over, and the thread."""
        await asyncio.to_thread(self._batcher.close)

    async def __aenter__(self) -> "AsyncContinuousBatcher":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


@asynccontextmanager
async def _progress(handles: list[RequestHandle], stats: Callable[[], BatcherStats]) -> AsyncIterator[None]:
    """Shows a bar over the requests meanwhile."""

    async def refresh() -> None:
        while progress.count(handles) < len(handles):
            await asyncio.sleep(REFRESH_SECONDS)

    with Progress(len(handles), True, stats) as progress:
        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()


async def _hand_in(function: Callable[[Callable[[], bool]], list[RequestHandle]]) -> list[RequestHandle]:
    """What a function hands in, in a thread; it is ended if the task is cancelled meanwhile.

    Args:
        function: Called with a function that says whether the task was cancelled.
    """
    handles: list[RequestHandle] = []
    left = threading.Event()

    def call() -> None:
        handles.extend(function(left.is_set))
        if left.is_set():
            _cancel(handles)

    try:
        await asyncio.to_thread(call)
    except asyncio.CancelledError:
        left.set()
        _cancel_soon(handles)  # what the thread handed in before it could know
        raise
    return handles


def _cancel(handles: list[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()


def _cancel_soon(handles: list[RequestHandle]) -> None:
    """In another thread: each waits for the step that is under way."""
    asyncio.get_running_loop().run_in_executor(None, _cancel, list(handles))
