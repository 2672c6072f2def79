"""A causal language model and its tokenizer from a hub id or a folder, or one line that says what is wrong with it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .errors import InvalidRequestError, UnsupportedModelError

SMALL = 50_000_000
"""Parameters."""
PATIENCE = 5.0
"""Seconds for the hub to answer."""
PROBE = [[5, 6, 7], [5, 6, 8]]
"""Two inputs that differ in their last token only: a causal model answers alike up to there."""
TEXT = "a, 1"


def load(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    needs_tokenizer: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode, and its tokenizer, which pads on the left.

    Args:
        name: Id on the hub, or a folder that `save_pretrained` wrote.
        device, dtype: Of the model.
        needs_tokenizer: Otherwise the tokenizer is None where there is none.

    Raises:
        InvalidRequestError: There is no such model, or it lacks a part.
        UnsupportedModelError: The model does not predict the next token from those before it.
    """
    _require_folder(name)
    where = {"local_files_only": not must_ask_hub(name)}
    with quiet():
        _require_language_model(name, where)
        tokenizer = _load_tokenizer(name, needs_tokenizer, where)
        model = _load(AutoModelForCausalLM, name, "model", dtype=dtype, **where).eval().to(device)
    if not is_causal(model):
        raise UnsupportedModelError(
            f"{name} is not a causal language model: its {type(model).__name__} looks at the tokens that follow."
        )
    if tokenizer is not None:
        _let_pad(tokenizer)
    return model, tokenizer


def must_ask_hub(name: str | Path) -> bool:
    """Whether the hub has to be asked for this model, and answers within `PATIENCE`.

    Where it does not, transformers would ask for each file again and again for half a minute.
    """
    try:
        if expanded(name).exists():
            return False
        model_info(str(name), timeout=PATIENCE)
    except (HfHubHTTPError, ValueError):  # an answer, or no name to ask for
        return True
    except Exception:  # noqa: BLE001 (each version has another client, with errors of its own)
        return False
    return True


def expanded(name: str | Path) -> Path:
    """As a path, with a home for `~`; as it is where nobody has that home."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path raises then)


@contextmanager
def few_threads(model: PreTrainedModel) -> Iterator[None]:
    """One thread for a small model: more do not help it, and wait for each other where the cores are shared."""
    before = torch.get_num_threads()
    if model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether the output at a token is the same whatever comes after it."""
    first, second = model(input_ids=torch.tensor(PROBE, device=model.device), use_cache=False).logits[:, :-1]
    tolerance = 1e-4 if first.dtype == torch.float32 else 2e-2
    return torch.allclose(first, second, atol=tolerance, rtol=tolerance)


def _require_language_model(name: str | Path, where: dict[str, bool]) -> None:
    config = _load(AutoConfig, name, "config", **where)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"{name} is not a causal language model: transformers knows no AutoModelForCausalLM for its model type, "
            f"{config.model_type!r}."
        )


def _load_tokenizer(name: str | Path, is_needed: bool, where: dict[str, bool]) -> Any:
    try:
        tokenizer = _load(AutoTokenizer, name, "tokenizer", **where)
        if not _can_read(tokenizer):  # what transformers makes of some folders without one
            raise InvalidRequestError(f"cannot load the tokenizer of {name}: it has no vocabulary.")
    except InvalidRequestError:
        if is_needed:
            raise
        return None
    return tokenizer


def _can_read(tokenizer: Any) -> bool:
    """Whether it makes more of a text than nothing, or tokens that stand for the unknown."""
    return bool(tokenizer.vocab_size and set(tokenizer(TEXT)["input_ids"]) - set(tokenizer.all_special_ids))


def _require_folder(name: str | Path) -> None:
    is_path = Path(name).is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if is_path and not Path(name).is_dir():
        raise InvalidRequestError(f"there is no folder {name}: give a folder with a model in it, or a model id.")


def _load(auto_class: Any, name: str | Path, part: str, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        known = Path(name).is_dir()
        where = (
            "the folder has none that transformers can read" if known else "no such folder, nor such an id within reach"
        )
        raise InvalidRequestError(f"cannot load the {part} of {name}: {where} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _let_pad(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:  # padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)


@contextmanager
def quiet() -> Iterator[None]:
    """Hushes transformers' warnings and progress bars."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
