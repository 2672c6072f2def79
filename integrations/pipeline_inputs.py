"""What a paged pipeline is called with: inputs of any make, and options that inputs have of their own."""

from collections.abc import Iterator, Mapping, Sized
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.utils.chat_template_utils import Chat, is_valid_message

from paged_cache import InvalidRequestError


class _Items(Dataset[Any]):
    """Anything with a length and items, as what transformers takes for a dataset."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def as_inputs(inputs: Any) -> Any:
    """Sequences and iterators as datasets and generators, which is what transformers knows; the rest as it is."""
    if isinstance(inputs, (str, list, Mapping, Dataset, GeneratorType, Chat)):
        return inputs
    if isinstance(inputs, tuple):
        return list(inputs)
    if isinstance(inputs, Iterator):
        return (item for item in inputs)
    if _has_numbers(inputs):
        return inputs  # one input, which `require_readable` names
    return _Items(inputs) if hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__") else inputs


def _has_numbers(inputs: Any) -> bool:
    """Whether the items are no texts: bytes, tensors, arrays of numbers."""
    kind = getattr(getattr(inputs, "dtype", None), "kind", "O")  # numpy's; texts are of kind O, T or U
    return isinstance(inputs, (bytes, bytearray, memoryview, torch.Tensor)) or kind in "?biufcS"


def as_chat(item: Any) -> Any:
    """A list of messages as the pipeline's `Chat`; the rest as it is."""
    is_chat = isinstance(item, (list, tuple)) and item and is_valid_message(item[0])
    return Chat(item) if is_chat else item


def require_readable(item: Any, tokenizer: Any, chat_template: Any, reads_text_only: bool) -> None:
    """Looks at one input.

    Raises:
        InvalidRequestError: It is neither a text nor a chat of texts, or a chat without a template.
    """
    item = as_chat(item)
    if not isinstance(item, Chat):
        if reads_text_only and not isinstance(item, str):
            hint = ", or KeyDataset(dataset, column) of a dataset" if isinstance(item, Mapping) else ""
            raise InvalidRequestError(
                f"the input is {type(item).__name__}: {item!s:.60}. It has to be a string, or a chat, a list of messages "
                f"with 'role' and 'content'{hint}."
            )
        return
    if not (getattr(tokenizer, "chat_template", None) or chat_template):
        raise InvalidRequestError(
            f"the input is a chat and {type(tokenizer).__name__} has no chat_template: set tokenizer.chat_template, or pass "
            "text."
        )
    for number, message in enumerate(item.messages):
        parts = message["content"] if isinstance(message["content"], list) else []
        kinds = [part.get("type", "text") for part in parts if isinstance(part, Mapping)]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise InvalidRequestError(
                f"message {number} has content of type {other!r}: text is generated from text alone here."
            )


def count(inputs: Any) -> int | None:
    """How many inputs there are; None if nobody knows."""
    try:
        return len(inputs) if isinstance(inputs, Sized) else None
    except TypeError:
        return None


def require_one_each(options: Mapping[str, Any], number: int | None) -> None:
    """Looks at the options that inputs have of their own.

    Raises:
        InvalidRequestError: A list is not as long as the inputs, or one streamer is for several.
    """
    for name, value in options.items():
        if number is not None and isinstance(value, list) and len(value) != number:
            raise InvalidRequestError(f"{name} has {len(value)} entries for {number} inputs: one each, or one for all.")
    if number != 1 and hasattr(options.get("streamer"), "put"):
        raise InvalidRequestError(
            f"streamer is one for {'many' if number is None else number} inputs: a list with one for each is needed."
        )


def require_none_left(options: Mapping[str, Any], number: int) -> None:
    """Raises `InvalidRequestError` for an option with more entries than there were inputs."""
    too_long = {name: value for name, value in options.items() if isinstance(value, list) and len(value) > number}
    require_one_each(too_long, number)


def of_input(index: int, name: str, value: Any) -> Any:
    """The value of an option for one input; a list has one for each.

    Raises:
        InvalidRequestError: The list is too short.
    """
    if not isinstance(value, list):
        return value
    if index >= len(value):
        raise InvalidRequestError(
            f"{name} has {len(value)} entries and there are more inputs: one each, or one for all."
        )
    return value[index]
