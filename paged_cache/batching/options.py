"""What a request may be given besides its prompt and the options of `generate`, and which options are lists by nature."""

import math
import operator
from collections.abc import Hashable
from dataclasses import dataclass, fields
from numbers import Real
from types import NoneType
from typing import Any

from ..errors import InvalidRequestError
from ..wording import shown

LISTS = {
    "bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "eos_token_id", "exponential_decay_length_penalty",
    "force_words_ids", "forced_eos_token_id", "logits_processor", "sequence_bias", "stop_strings", "stopping_criteria",
    "suppress_tokens",
}  # fmt: skip
"""Options of `generate` of which a list is one value, for all prompts."""

KEYS = {"cache_salt", "tenant"}
"""Of which a tuple is one value, too."""

REALS = (
    "max_time",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "length_penalty",
)
WHOLE_NUMBERS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams",
    "num_return_sequences", "top_k",
)  # fmt: skip
"""Options of `generate` that are numbers."""


@dataclass(frozen=True)
class RequestOptions:
    """Options of the batcher's own; see `ContinuousBatcher.submit`.

    Raises:
        InvalidRequestError: One of them is wrong; the message names it.
    """

    request_id: str | None = None
    priority: int = 0
    timeout: float | None = None
    seed: int | None = None
    cache_salt: Hashable = None
    tenant: Hashable = None
    expected_tokens: float | None = None
    adapter_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("request_id", "adapter_name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidRequestError(f"{name}={value!r}: a string is needed.")
        for name in ("priority", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "seed" and value is None):
                raise InvalidRequestError(f"{name}={value!r}: an integer is needed.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequestError(f"seed={self.seed}: 64 bits are what torch takes.")
        for name in ("timeout", "expected_tokens"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InvalidRequestError(f"{name}={value!r}: a number above 0 is needed.")
        for name in sorted(KEYS):
            _require_hashable(name, getattr(self, name))


SINGULAR = {"adapter_names": "adapter_name"}
"""What an option of many prompts is called for one of them."""

OWN_OPTIONS = [field.name for field in fields(RequestOptions)]


def per_prompt(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of `count` prompts: a list, a tensor `[count]` or an array has one for each.

    So has a tuple, but for `cache_salt` and `tenant`.

    Raises:
        InvalidRequestError: A list of another length, or one streamer for several prompts.
    """
    if count > 1 and hasattr(options.get("streamer"), "put"):
        raise InvalidRequestError(f"streamer is one for {count} prompts: a list with one for each is needed.")
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in options.items():
        for row, own in zip(rows, _values(name, value, count), strict=True):
            row[SINGULAR.get(name, name)] = own
    return rows


def _values(name: str, value: Any, count: int) -> list[Any]:
    is_list = isinstance(value, list) or (isinstance(value, tuple) and name not in KEYS)
    if name in LISTS or not (is_list or getattr(value, "ndim", 0) == 1):
        return [value] * count
    values = list(value) if isinstance(value, (list, tuple)) else value.tolist()
    if len(values) != count:
        raise InvalidRequestError(f"{name} has {len(values)} entries for {count} prompts: one each, or one for all.")
    return values


def require_numbers(options: dict[str, Any]) -> None:
    """Raises `InvalidRequestError` for numbers that are none: transformers' own error would not name the option, or come late."""
    for name in REALS:
        value = options.get(name)
        if not isinstance(value, (Real, NoneType)) and getattr(value, "ndim", None) != 0:
            raise InvalidRequestError(f"{name}={shown(value)}: a number is needed.")
    for name in WHOLE_NUMBERS:
        value = options.get(name)
        try:
            operator.index(0 if value is None or (isinstance(value, float) and value.is_integer()) else value)
        except TypeError:
            raise InvalidRequestError(f"{name}={shown(value)}: a whole number is needed.") from None


def require_callables(options: dict[str, Any]) -> None:
    """Raises `InvalidRequestError` for processors, criteria and streamers that cannot be called."""
    for name in ("logits_processor", "stopping_criteria"):
        value = options.get(name)
        if not isinstance(value, (list, tuple, NoneType)):
            raise InvalidRequestError(f"{name}={shown(value)}: a list is needed.")
        for item in value or []:
            if not callable(item):
                raise InvalidRequestError(
                    f"{name} holds {type(item).__name__}, which cannot be called; it is one list for all prompts."
                )
    streamer = options.get("streamer")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise InvalidRequestError(f"streamer is {type(streamer).__name__}; it needs the methods put and end.")


def _require_hashable(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise InvalidRequestError(f"{name} is {value!r}; it has to be hashable, such as a string.") from None
