"""Input processing: whatever people call a prompt becomes token ids."""

from collections.abc import Iterable, Mapping
from itertools import dropwhile
from typing import Any

import torch

from ..errors import InvalidRequestError
from ..wording import shown


def as_prompts(prompts: Any, attention_mask: Any = None, pad_token_id: int | None = None) -> list[Any]:
    """A list with one entry per prompt.

    Args:
        prompts: A list of prompts in any of the forms of `token_ids`; or a tensor `[batch, length]`; or what a tokenizer
            returns, with its mask.
        attention_mask: `[batch, length]`, 0 for padding, for a tensor of prompts.
        pad_token_id: What stands for padding on the left of a tensor without a mask, as `generate` takes it.

    Raises:
        InvalidRequestError: It is one prompt, or nothing of that kind.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        prompts, attention_mask = prompts["input_ids"], prompts.get("attention_mask", attention_mask)
    if getattr(prompts, "ndim", 0) == 2:  # a tensor or an array
        return _without_padding(torch.as_tensor(prompts), attention_mask, pad_token_id)
    if attention_mask is not None:
        if not isinstance(prompts, (list, tuple)) or len(prompts) != len(attention_mask):
            raise InvalidRequestError(
                "attention_mask goes with a tensor of prompts [batch, length], or with as many lists."
            )
        return [_unmasked(_integers(ids), mask) for ids, mask in zip(prompts, _lists(attention_mask), strict=True)]
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable) or hasattr(prompts, "ndim"):
        raise InvalidRequestError(
            f"prompts is {type(prompts).__name__}: generate takes a list of prompts, [prompt] for one; submit takes one."
        )
    items = list(prompts)
    if items and isinstance(items[0], int):
        raise InvalidRequestError("prompts is a list of token ids: generate takes a list of prompts, [ids] for one.")
    if items and isinstance(items[0], Mapping) and "role" in items[0]:
        raise InvalidRequestError("prompts is one chat: generate takes a list of prompts, [messages] for one.")
    return items


def require_readable(prompts: list[Any], tokenizer: Any) -> None:
    """Raises `InvalidRequestError` if all are text or chats and there is no tokenizer: that is no prompt's fault."""
    kinds = ["a string" if isinstance(prompt, str) else "a chat" if _is_chat(prompt) else None for prompt in prompts]
    if kinds and kinds[0] is not None and None not in kinds:
        _require(tokenizer, kinds[0])


def token_ids(
    prompt: Any,
    tokenizer: Any,
    vocab_size: int | None,
    attention_mask: Any = None,
    pad_token_id: int | None = None,
) -> list[int]:
    """The ids of one prompt, without padding.

    Args:
        prompt: Token ids (a list, a tensor `[length]` or `[1, length]`, an array), what a tokenizer returns for one text, a
            string, or chat messages (a list of dicts with "role" and "content"). The latter two need a tokenizer, with a
            chat template for messages.
        tokenizer: Or None.
        vocab_size: Ids are below it, if it is known.
        attention_mask: As many numbers as ids, 0 for padding.
        pad_token_id: What stands for padding on the left of a tensor `[1, length]` without a mask, as `generate` takes it.

    Raises:
        InvalidRequestError: None of these, empty, or with ids that the model does not have.
    """
    if attention_mask is not None and (isinstance(prompt, str) or _is_chat(prompt)):
        raise InvalidRequestError(
            "attention_mask goes with token ids; the tokenizer makes those of text without padding."
        )
    if isinstance(prompt, str):
        _require(tokenizer, "a string")
        ids = list(tokenizer(prompt)["input_ids"])
    elif _is_chat(prompt):
        _require(tokenizer, "a chat")
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidRequestError("the tokenizer has no chat_template: pass the prompt as a string or token ids.")
        ids = list(tokenizer(_render(prompt, tokenizer), add_special_tokens=False)["input_ids"])
    else:
        ids = _unpadded(prompt, attention_mask, pad_token_id)
    if not ids:
        raise InvalidRequestError("the prompt is empty: it needs at least one token.")
    wrong = next((token for token in ids if token < 0 or (vocab_size is not None and token >= vocab_size)), None)
    if wrong is not None:
        raise InvalidRequestError(f"token id {wrong} is none of the model's, 0 to {(vocab_size or 1) - 1}.")
    return ids


def _without_padding(prompts: torch.Tensor, attention_mask: Any, pad_token_id: int | None) -> list[list[int]]:
    if attention_mask is None:
        return [list(dropwhile(lambda token: token == pad_token_id, row)) for row in prompts.tolist()]
    mask = torch.as_tensor(attention_mask)
    if mask.shape != prompts.shape:
        raise InvalidRequestError(f"attention_mask {tuple(mask.shape)} does not fit prompts {tuple(prompts.shape)}.")
    return [row[shown != 0].tolist() for row, shown in zip(prompts, mask, strict=True)]


def _unpadded(prompt: Any, attention_mask: Any, pad_token_id: int | None) -> list[int]:
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        prompt, attention_mask = prompt["input_ids"], prompt.get("attention_mask", attention_mask)
    ids = _integers(prompt)
    if attention_mask is not None:
        return _unmasked(ids, attention_mask)
    if getattr(prompt, "ndim", 0) < 2:
        return ids
    return list(dropwhile(lambda token: token == pad_token_id, ids)) or ids[-1:]


def _unmasked(ids: list[int], attention_mask: Any) -> list[int]:
    mask = _lists(attention_mask)
    if isinstance(mask, (list, tuple)) and len(mask) == 1 and isinstance(mask[0], (list, tuple)):
        mask = mask[0]
    if not isinstance(mask, (list, tuple)) or not all(value in (0, 1) for value in mask):
        raise InvalidRequestError(
            f"attention_mask={shown(attention_mask)}: a 0 or 1 for each token of the prompt is needed."
        )
    if len(mask) != len(ids):
        raise InvalidRequestError(f"attention_mask has {len(mask)} entries for a prompt of {len(ids)} tokens.")
    return [token for token, shown in zip(ids, mask, strict=True) if shown]


def _render(messages: Any, tokenizer: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except Exception as error:
        raise InvalidRequestError(f"the chat does not suit the tokenizer's template: {error}") from error


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(isinstance(m, Mapping) for m in prompt)


def _require(tokenizer: Any, kind: str) -> None:
    if tokenizer is None:
        raise InvalidRequestError(
            f"the prompt is {kind}: ContinuousBatcher(model, pool, tokenizer=tokenizer) can read it."
        )


def _lists(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _integers(prompt: Any) -> list[int]:
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        prompt = prompt["input_ids"]
    values = _lists(prompt)
    if isinstance(values, (list, tuple)) and len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = values[0]
    if not isinstance(values, (list, tuple, range)) or not all(type(value) is int for value in values):
        raise InvalidRequestError(
            f"the prompt is {type(prompt).__name__}: {shown(prompt, 60)}. It has to be token ids (a list or a tensor [length]), "
            "a string, or chat messages."
        )
    return list(values)
