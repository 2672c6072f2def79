"""Input processing: a prompt and its options become a request."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..devices import input_device
from ..errors import InvalidRequestError
from .adapter_store import AdapterStore
from .beam_search import BeamSearch
from .decoding import Decoding
from .options import RequestOptions, require_callables
from .positions import Positions
from .preparing import BEAMS, Preparation, Prepared
from .prompts import as_prompts, require_readable, token_ids
from .request import Request, Row, Search


class InputProcessor:
    """Makes requests for one model.

    Args:
        model: The `PreTrainedModel` that generates.
        tokenizer: For text, chat messages and `stop_strings`; None if there is none.
        clock: Seconds.
        adapters: Those that a request may name.

    Attributes:
        model: As given.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, clock: Callable[[], float], adapters: AdapterStore
    ) -> None:
        self.model, self._tokenizer, self._clock, self._adapters = model, tokenizer, clock, adapters
        self._prepare, self._device = Preparation(model, tokenizer), input_device(model)
        self._positions = Positions(model)
        self._numbers = itertools.count()

    def read_all(self, prompts: Any, attention_mask: Any, options: dict[str, Any]) -> list[Any]:
        """One entry per prompt, each for `read`; see `as_prompts`.

        Raises:
            InvalidRequestError: They are one prompt, nothing of that kind, or nothing but text and there is no tokenizer.
        """
        items = as_prompts(prompts, attention_mask, self._pad_token_id(options))
        require_readable(items, self._tokenizer)
        return items

    def read(self, prompt: Any, attention_mask: Any, options: dict[str, Any]) -> list[int]:
        """Token ids of a prompt; its options say what stands for padding; see `token_ids`.

        Raises:
            InvalidRequestError: It is empty, too long, of no known form, or has ids that the model does not have.
        """
        vocab_size = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        ids = token_ids(prompt, self._tokenizer, vocab_size, attention_mask, self._pad_token_id(options))
        self._positions.require_room(ids)
        return ids

    def make(self, ids: list[int], options: RequestOptions, generation_config: Any, kwargs: dict[str, Any]) -> Request:
        """A request that is ready to be scheduled.

        Args:
            ids: The prompt.
            options: The batcher's own.
            generation_config, kwargs: `generate`'s.

        Raises:
            InvalidRequestError, ValueError, TypeError: An option is wrong or cannot be honoured.
        """
        require_callables(kwargs)
        prepared = self._prepare(ids, generation_config, kwargs)
        self._positions.limit(prepared.criteria)
        decoding = self._decoding(prepared, options.seed)
        now, name = self._clock(), options.request_id
        request = Request(
            request_id=f"request-{next(self._numbers)}" if name is None else name,
            prompt_ids=decoding.prompt_ids,
            max_new_tokens=decoding.max_new_tokens,
            num_rows=decoding.num_rows,
            num_return_sequences=prepared.config.num_return_sequences or 1,
            cache_salt=options.cache_salt,
            asked_adapter=options.adapter_name,
            tenant=options.tenant if options.adapter_name is None else (options.adapter_name, options.tenant),
            priority=options.priority,
            expected_tokens=options.expected_tokens,
            deadline=None if options.timeout is None else now + options.timeout,
            rows=[Row(list(decoding.prompt_ids))],
            arrival_time=now,
            decoding=decoding,
        )
        self._adapters.enter(request)
        return request

    def require_shorter(self, ids: list[int], options: dict[str, Any]) -> None:
        """Raises `InvalidRequestError` for a prompt as long as `max_length`, which counts the prompt: that is this prompt's fault."""
        config = options.get("generation_config")
        most: Any = options.get("max_length", getattr(config, "max_length", None))
        if hasattr(most, "__index__") and self._asked("max_new_tokens", options) is None and 1 < int(most) <= len(ids):
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens, max_length={most} leaves none for the answer."
            )

    def _pad_token_id(self, options: dict[str, Any]) -> int | None:
        """What `generate` takes for padding where no mask says so; None if that is a token that ends sequences, or unknown."""
        pad, eos = (self._asked(name, options) for name in ("pad_token_id", "eos_token_id"))
        eos = eos.tolist() if hasattr(eos, "tolist") else eos
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        return pad if isinstance(pad, int) and pad not in ends else None

    def _asked(self, name: str, options: dict[str, Any]) -> Any:
        """What `generate` takes for an option: the request's, its config's or the model's."""
        config = options.get("generation_config")
        sources = [options, vars(config) if hasattr(config, "__dict__") else {}, vars(self.model.generation_config)]
        return next((source[name] for source in sources if source.get(name) is not None), None)

    def _decoding(self, prepared: Prepared, seed: int | None) -> Search:
        generator = self._generator(seed) if prepared.config.do_sample else None
        if prepared.mode in BEAMS:
            return BeamSearch(self.model, prepared, generator)
        return Decoding(prepared, generator)

    def _generator(self, seed: int | None) -> torch.Generator:
        """Without a seed one is drawn from torch's own generator, so that `torch.manual_seed` decides."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        return torch.Generator(self._device).manual_seed(seed)
