"""transformers' text-generation pipeline over a `ContinuousBatcher`."""

import logging
import threading
from functools import partial
from types import TracebackType
from typing import Any

from transformers import TextGenerationPipeline

from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, PagedCacheError, Policy, RequestOutput

from .generate_call import GenerateCall
from .paged_iterator import PagedIterator, Pending
from .pipeline_inputs import as_chat, as_inputs, count, of_input, require_none_left, require_one_each, require_readable
from .pipeline_settings import (
    CALL_OPTIONS,
    PER_INPUT,
    REQUEST_OPTIONS,
    SETTINGS,
    UNFINISHED_PER_SEQ,
    device_type,
    make_pool,
    max_num_seqs_of,
    read_ahead_of,
    require_generating,
)

logger = logging.getLogger("paged_cache")


class PipelineTimeoutError(PagedCacheError, TimeoutError):
    """An answer was not complete within the `timeout` of its input.

    Attributes:
        output: What there is of it: `output.text` and `output.generated_tokens`, without the prompt.
    """

    output: RequestOutput


class PagedTextGenerationPipeline(TextGenerationPipeline):
    """Text generation as usual, over a `ContinuousBatcher`: inputs join and leave the batch at every step.

    Made by `paged_pipeline`, or by `transformers.pipeline(..., pipeline_class=PagedTextGenerationPipeline)`, which takes the
    keyword arguments below, too. Inputs, options and outputs are those of `TextGenerationPipeline`; `batch_size` and
    `num_workers` have no effect. A call also takes the options of `ContinuousBatcher.submit` (`seed`, `priority`,
    `adapter_names`, ...), as one for all or as a list with one for each input, and

    - `read_ahead`: inputs that are read before the output of the first of them is taken, at most;
    - `return_errors`: an error is the output of its input, instead of being raised in its turn;
    - `progress_bar`: shows a bar on a terminal; by default for lists.

    Calls may come from several threads.

    Args:
        pool: Of the model, `BlockPool.for_model(model, ...)`. None for one of its own.
        policy: Who is next, see `ContinuousBatcher`.
        memory: Of its own pool, as for `BlockPool.for_model`. None for room for as many of the model's longest contexts as
            sequences run at once, but at most 25 % of the free memory, on a GPU 80 %.
        **kwargs: Further ones of `ContinuousBatcher` (`max_num_seqs`, ...) and those of `TextGenerationPipeline`.

    Raises:
        UnsupportedModelError: The model generates no text from tokens alone.
        InvalidRequestError: A setting is wrong or cannot be honoured.
    """

    pool: BlockPool | None
    _batcher: ContinuousBatcher | None
    _reads_text_only = True

    def __init__(
        self,
        *args: Any,
        pool: BlockPool | None = None,
        policy: str | Policy = "sjf",
        memory: int | float | str | None = None,
        **kwargs: Any,
    ) -> None:
        require_generating(args[0] if args else kwargs.get("model"))
        settings = {name: kwargs.pop(name) for name in SETTINGS & kwargs.keys()}
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._open(pool, policy, memory, settings)

    def _open(
        self, pool: BlockPool | None, policy: str | Policy, memory: int | float | str | None, settings: dict[str, Any]
    ) -> None:
        if pool is not None and memory is not None:
            raise InvalidRequestError(
                f"pool and memory={memory!r} are given: memory is for a pool of the pipeline's own."
            )
        if self.tokenizer is None:
            raise InvalidRequestError("tokenizer is None: the pipeline reads and writes text.")
        if self.assistant_model is not None:
            name = type(self.assistant_model).__name__
            raise InvalidRequestError(
                f"assistant_model={name} cannot be honoured: a batcher does not assist generation."
            )
        if settings.get("max_queue_size") is not None:
            raise InvalidRequestError("max_queue_size cannot be honoured: read_ahead limits what waits in a pipeline.")
        settings["max_num_seqs"] = max_num_seqs_of(settings.get("max_num_seqs"), device_type(self.model, pool))
        self.pool = pool if pool is not None else make_pool(self.model, memory, settings["max_num_seqs"])
        self._batcher = ContinuousBatcher(self.model, self.pool, policy=policy, tokenizer=self.tokenizer, **settings)
        self._max_num_seqs, self._lock = settings["max_num_seqs"], threading.RLock()

    @property
    def batcher(self) -> ContinuousBatcher:
        """For `stats()`, and `start()` for a thread that works while no output is being waited for.

        Raises:
            PagedCacheError: The pipeline is closed.
        """
        if self._batcher is None:
            raise PagedCacheError("this pipeline is closed: make a new one with paged_pipeline(pipe).")
        return self._batcher

    def close(self) -> None:
        """Ends what is under way, and lets go of the model and of the pool; the latter is freed if nobody else has it."""
        if self._batcher is not None:
            self._batcher.close()
        self._batcher = self.pool = None

    def __enter__(self) -> "PagedTextGenerationPipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Continues texts or chats.

        Args:
            text_inputs: As for `TextGenerationPipeline`: a string, a chat, a list of either, a dataset or a generator; any
                other sequence or iterator is taken as a dataset or generator.
            **kwargs: As for `TextGenerationPipeline`, and those of this class.

        Returns:
            As from `TextGenerationPipeline`: a list of records, for a list one such list per input, for a dataset or a
            generator an iterator over these, which reads while it is read.

        Raises:
            InvalidRequestError, ValueError, TypeError: An option or an input is wrong or cannot be honoured.
            OutOfBlocksError: An input never fits into the pool.
            PipelineTimeoutError: An answer was not complete within `timeout` seconds.
        """
        _ = self.batcher
        inputs = as_inputs(text_inputs)
        if isinstance(inputs, list) and not inputs:
            require_none_left({name: kwargs[name] for name in PER_INPUT & kwargs.keys()}, 0)
            return []
        return super().__call__(inputs, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> PagedIterator:
        """The outputs for many inputs; called by `__call__`."""
        return self._iterator(inputs, preprocess_params, forward_params, postprocess_params, batch_size, num_workers)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """The output for one input; called by `__call__`."""
        (output,) = self._iterator([inputs], preprocess_params, forward_params, postprocess_params)
        return output

    def preprocess(self, prompt_text: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in `TextGenerationPipeline`, for text only."""
        self._require_readable(prompt_text, kwargs)
        return super().preprocess(prompt_text, *args, **kwargs)  # type: ignore[no-untyped-call]

    def _sanitize_parameters(
        self, *args: Any, **parameters: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        own = {name: parameters.pop(name) for name in (REQUEST_OPTIONS | CALL_OPTIONS) & parameters.keys()}
        preprocess, forward, postprocess = super()._sanitize_parameters(*args, **parameters)  # type: ignore[no-untyped-call]
        return preprocess, {**forward, **own}, postprocess

    def _iterator(
        self,
        inputs: Any,
        preprocess: dict[str, Any],
        forward: dict[str, Any],
        postprocess: dict[str, Any],
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> PagedIterator:
        is_eager = isinstance(inputs, list)
        for name, value, usual in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value != usual:
                logger.info("%s=%s has no effect: inputs join and leave the batch at every step", name, value)
        own = {name: forward[name] for name in CALL_OPTIONS & forward.keys()}
        for item in inputs if is_eager and not own.get("return_errors") else ():
            self._require_readable(item, preprocess)
        forward = {name: value for name, value in forward.items() if name not in CALL_OPTIONS}
        per_input = {name: forward[name] for name in PER_INPUT & forward.keys()}
        require_one_each(per_input, count(inputs))
        return PagedIterator(
            inputs,
            partial(self._begin, preprocess, forward, is_eager and len(inputs) == 1),
            partial(self._finish, postprocess),
            partial(require_none_left, per_input),
            max_unfinished=UNFINISHED_PER_SEQ * self._max_num_seqs,
            read_ahead=read_ahead_of(own.get("read_ahead"), is_eager, self._max_num_seqs),
            is_eager=is_eager,
            returns_errors=own.get("return_errors", False),
            progress_bar=own.get("progress_bar", is_eager and len(inputs) > 1),
        )

    def _require_readable(self, item: Any, preprocess: dict[str, Any]) -> None:
        template = (preprocess.get("tokenizer_encode_kwargs") or {}).get("chat_template")
        require_readable(item, self.tokenizer, template, self._reads_text_only)

    def _begin(
        self, preprocess: dict[str, Any], forward: dict[str, Any], is_alone: bool, index: int, item: Any
    ) -> Pending:
        """Hands the request of one input in."""
        own = {name: of_input(index, name, forward[name]) for name in PER_INPUT & forward.keys()}
        preprocess = {**preprocess, **{name: own[name] for name in own.keys() & preprocess.keys()}}
        forward = {name: own.get(name, value) for name, value in forward.items() if name not in REQUEST_OPTIONS}
        options = {name: own[name] for name in REQUEST_OPTIONS & own.keys()}
        options["adapter_name"] = options.pop("adapter_names", None)
        with self._lock:  # a tokenizer's settings are changed by those who use it
            inputs = self.preprocess(as_chat(item), **preprocess)
            call = GenerateCall.of(self, inputs, forward)
            handle = self.batcher.submit(call.prompt, **options, **call.options)
        where = "" if is_alone else f"input {index}: "
        return Pending(index, handle, about=(where, call, inputs, forward, options.get("timeout")))

    def _finish(self, postprocess: dict[str, Any], pending: Pending) -> Any:
        """The output of one input, or why there is none."""
        where, call, inputs, forward, timeout = pending.about
        assert pending.handle is not None
        output = pending.handle.result(timeout=0)
        _raise_error(output, where)
        _raise_if_late(output, timeout, call.option("max_time"), where)
        with self._lock:
            outputs = call.outputs(self, inputs, forward, output)
            return self.postprocess(outputs, **postprocess)  # type: ignore[no-untyped-call]


def _raise_error(output: RequestOutput, where: str) -> None:
    """Raises what ended a request, if it did not end by itself."""
    if output.finish_reason == "abort":
        raise PagedCacheError(f"{where}the pipeline was closed before the answer was complete.")
    if isinstance(output.error, PagedCacheError):
        output.error.args = (f"{where}{output.error}",)
    if output.error is not None:
        raise output.error


def _raise_if_late(output: RequestOutput, timeout: float | None, max_time: float | None, where: str) -> None:
    """`max_time` is an option of `generate`, whose answer is then as long as it has become; `timeout` is ours."""
    latency = output.metrics.e2e_latency or 0.0
    if output.finish_reason != "timeout" or timeout is None or (max_time is not None and latency < timeout):
        return
    error = PipelineTimeoutError(
        f"{where}the answer was not complete within timeout={timeout} seconds: {len(output.generated_tokens)} tokens were "
        "generated, see `output.text` of this error. Allow more time, or None for any."
    )
    error.output = output
    raise error
