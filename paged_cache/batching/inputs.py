"""Input processing: a prompt and its options become a request."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InvalidRequestError
from .beam_search import BeamSearch
from .decoding import Decoding
from .preparing import BEAMS, Preparation, Prepared
from .prompts import token_ids
from .request import Request, Row


class InputProcessor:
    """Makes requests for one model.

    Args:
        model: The `PreTrainedModel` that generates.
        tokenizer: For text, chat messages and `stop_strings`; None if there is none.
        clock: Seconds.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, clock: Callable[[], float]) -> None:
        self._model, self._tokenizer, self._clock = model, tokenizer, clock
        self._prepare = Preparation(model, tokenizer)
        embeddings = model.get_input_embeddings()
        self._vocab_size = getattr(embeddings, "num_embeddings", None)
        self._numbers = itertools.count()

    def read(self, prompt: Any) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidRequestError: It is empty, of no known form, or has ids that the model does not have.
        """
        return token_ids(prompt, self._tokenizer, self._vocab_size)

    def make(
        self,
        ids: list[int],
        *,
        generation_config: Any = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        seed: int | None = None,
        cache_salt: Any = None,
        tenant: Any = None,
        expected_tokens: float | None = None,
        adapter_name: str | None = None,
        **generate_kwargs: Any,
    ) -> Request:
        """A request that is ready to be scheduled; see `ContinuousBatcher.submit` for the options.

        Raises:
            InvalidRequestError, ValueError, TypeError: An option is wrong or cannot be honoured.
        """
        if adapter_name is not None:
            raise InvalidRequestError(
                f"adapter_name={adapter_name!r} cannot be honoured: activate it with model.set_adapter({adapter_name!r})."
            )
        _require_hashable("cache_salt", cache_salt)
        _require_hashable("tenant", tenant)
        if timeout is not None and timeout <= 0:
            raise InvalidRequestError(f"timeout={timeout}: seconds above 0 are needed.")
        prepared = self._prepare(ids, generation_config, generate_kwargs)
        decoding = self._decoding(prepared, seed)
        now = self._clock()
        return Request(
            request_id=f"request-{next(self._numbers)}" if request_id is None else request_id,
            prompt_ids=decoding.prompt_ids,
            max_new_tokens=decoding.max_new_tokens,
            num_rows=decoding.num_rows,
            cache_salt=cache_salt,
            tenant=tenant,
            priority=priority,
            expected_tokens=expected_tokens,
            deadline=None if timeout is None else now + timeout,
            rows=[Row(list(decoding.prompt_ids))],
            arrival_time=now,
            decoding=decoding,
        )

    def _decoding(self, prepared: Prepared, seed: int | None) -> Any:
        generator = self._generator(seed) if prepared.config.do_sample else None
        if prepared.mode in BEAMS:
            return BeamSearch(self._model, prepared, generator)
        return Decoding(prepared, generator)

    def _generator(self, seed: int | None) -> torch.Generator:
        """Without a seed one is drawn from torch's own generator, so that `torch.manual_seed` decides."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return torch.Generator(self._model.device).manual_seed(seed)


def _require_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise InvalidRequestError(f"{name} is {value!r}; it has to be hashable, such as a string.") from None
