"""What can be served: by which models, within which limits, and which requests at all."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compat import base_model, inputs_of_peft
from ..errors import InvalidRequestError, OutOfBlocksError, PagedCacheError, UnsupportedModelError
from ..patching import hold
from ..pool import BlockPool
from ..prepacking import prepack_weights
from ..wording import shown
from .events import Observer
from .pool_memory import PoolMemory
from .request import Request

LIMITS = {"cuda": {"max_num_seqs": 256, "max_num_batched_tokens": 8192}}
"""By device type;"""
LIMITS_ELSEWHERE = {"max_num_seqs": 32, "max_num_batched_tokens": 512}


def require_served(model: torch.nn.Module, pool: BlockPool) -> PreTrainedModel:
    """The transformers model that generates.

    Raises:
        UnsupportedModelError, InvalidRequestError: See `ContinuousBatcher`.
    """
    inner = base_model(model)
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} is no transformers model that generates text.")
    method = inputs_of_peft(model)
    if method is not None:
        raise UnsupportedModelError(
            f"{method} of peft changes the inputs of {type(inner).__name__}, which a batcher makes itself: use "
            "model.generate, or an adapter that lies in the model's layers, such as LoRA."
        )
    if inner.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(inner).__name__} is an encoder-decoder: its prompts are not token ids alone."
        )
    if not isinstance(pool, BlockPool):
        raise InvalidRequestError(f"pool={shown(pool)}: a BlockPool is needed, BlockPool.for_model(model, ...).")
    if not pool.belongs_to(inner):
        raise InvalidRequestError(f"the pool is none of this {type(inner).__name__}: BlockPool.for_model(model, ...).")
    if inner.training:
        raise InvalidRequestError("the model is in training mode, where dropout is active: call model.eval() first.")
    return inner


def hold_for(model: torch.nn.Module, prepack: bool | None) -> Callable[[], None]:
    """Keeps a model patched, and prepacked if that is asked for, until the function is called that this returns.

    Raises:
        InvalidRequestError: `prepack` is neither True nor False, nor None, which is False.
    """
    if not (prepack is None or isinstance(prepack, bool)):
        raise InvalidRequestError(f"prepack_weights={shown(prepack)}: True or False is needed.")
    with ExitStack() as stack:
        stack.callback(hold(base_model(model)))
        if prepack:
            stack.enter_context(prepack_weights(model))
        return stack.pop_all().close


def require_limits(tokenizer: Any, **limits: Any) -> None:
    """Looks at a batcher's settings: limits are positive whole numbers or None, a tokenizer can be called.

    Raises:
        InvalidRequestError: One is not; it is named with its value.
    """
    for name, value in limits.items():
        if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
            raise InvalidRequestError(f"{name}={shown(value)}: a whole number of at least 1 is needed, or None.")
    if tokenizer is not None and not callable(tokenizer):
        raise InvalidRequestError(
            f"tokenizer={shown(tokenizer)}: a tokenizer object is needed, AutoTokenizer.from_pretrained(...)."
        )


def limits_for(device_type: str, given: dict[str, int | None]) -> dict[str, int]:
    """What is given, and the default of the device for what is None."""
    defaults = LIMITS.get(device_type, LIMITS_ELSEWHERE)
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}  # type: ignore[misc]


def require_observers(observers: Iterable[Observer] | None) -> list[Observer]:
    """A list of them.

    Raises:
        InvalidRequestError: One cannot be called, or they are no list.
    """
    observers = () if observers is None else observers
    if not isinstance(observers, Iterable):
        raise InvalidRequestError(f"observers={shown(observers)}: a list is needed.")
    found = list(observers)
    for observer in found:
        if not callable(observer):
            raise InvalidRequestError(
                f"observer {shown(observer)}: something that can be called with an event is needed."
            )
    return found


def why_never(request: Request, memory: PoolMemory, max_num_seqs: int, whole_prompts: bool) -> PagedCacheError | None:
    """Why a request can never be served; None if it can."""
    if request.num_rows > max_num_seqs:
        return InvalidRequestError(
            f"{request.num_rows} sequences at once (num_beams, num_return_sequences) never fit into max_num_seqs="
            f"{max_num_seqs}."
        )
    needed = memory.blocks_at_most(request, whole_prompts)
    if needed > memory.num_blocks:
        return OutOfBlocksError(
            needed,
            memory.num_blocks,
            f"a prompt of {request.num_prompt_tokens} tokens, max_new_tokens={request.max_new_tokens} and "
            f"{request.num_rows} sequences need up to {needed} blocks of {memory.block_size} tokens, the pool has "
            f"{memory.num_blocks}: make it larger or ask for less.",
        )
    return None


def require_different(requests: list[Request]) -> None:
    """Raises `InvalidRequestError` if two requests have one name."""
    counts = Counter(request.request_id for request in requests)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise InvalidRequestError(f"request_id {twice!r} is given {counts[twice]} times: every request needs its own.")
