"""Intake: what people hand in becomes requests with handles, which enter the queue or are rejected."""

from typing import Any

from ..errors import InvalidRequestError
from .engine import Engine
from .handle import RequestHandle
from .inputs import InputProcessor
from .loop import EngineLoop
from .options import OWN_OPTIONS, RequestOptions
from .request import Request, Status
from .serving import why_never


class Intake:
    """Lets requests into one batcher.

    Args:
        inputs: Reads prompts and options.
        engine: Executes the requests.
        loop: Hands them to the engine.
    """

    def __init__(self, inputs: InputProcessor, engine: Engine, loop: EngineLoop) -> None:
        self._inputs, self._engine, self._loop = inputs, engine, loop

    def make(self, prompt: Any, options: RequestOptions, config: Any, kwargs: dict[str, Any], owner: object) -> Request:
        """A request with a handle, which lets `owner` live until the request is over.

        Raises:
            InvalidRequestError, ValueError, TypeError: The prompt or an option is wrong or cannot be honoured.
        """
        ids = self._inputs.read(prompt, kwargs.pop("attention_mask", None), {**kwargs, "generation_config": config})
        request = self._inputs.make(ids, options, config, kwargs)
        self._give_handle(request, owner)
        return request

    def make_one_of_many(self, prompt: Any, options: dict[str, Any], where: str, owner: object) -> Request:
        """The same for one of several prompts; where this one cannot be read, a request that is over.

        Args:
            prompt: What is to be continued.
            options: The batcher's own and those of `generate`, by name.
            where: Goes before the message of an error.
            owner: Lives until the request is over.

        Raises:
            InvalidRequestError, ValueError, TypeError: An option is wrong or cannot be honoured.
        """
        try:
            ids, error = self._inputs.read(prompt, None, options), None
            self._inputs.require_shorter(ids, options)
        except InvalidRequestError as wrong:
            ids, error = [0], InvalidRequestError(f"{where}{wrong}")
        own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
        try:
            request = self._inputs.make(ids, RequestOptions(**own), options.pop("generation_config", None), options)
        except (InvalidRequestError, ValueError, TypeError) as wrong:
            wrong.args = (f"{where}{wrong}",)
            raise
        self._give_handle(request, owner)
        if error is not None:
            request.prompt_ids = []
            self._loop.reject(request, error)
        return request

    def enter(self, request: Request) -> bool:
        """Whether there was room in the queue; what can never be served, or is over, needs none and is rejected."""
        if request.status is Status.FINISHED:
            return True
        engine = self._engine
        error = why_never(request, engine.memory, engine.scheduler.max_num_seqs, engine.forward.whole_prompts)
        if error is not None:
            self._loop.reject(request, error)
            return True
        return self._loop.try_enter(request)

    def _give_handle(self, request: Request, owner: object) -> None:
        if self._loop.is_under_way(request.request_id):
            raise InvalidRequestError(f"request_id {request.request_id!r} is under way: every request needs its own.")
        request.handle = RequestHandle(request.request_id, self._loop.wait, self._loop.cancel, owner)
