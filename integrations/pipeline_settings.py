"""What can be said to a paged pipeline besides what transformers knows, and what holds where nothing is said."""

import inspect
from typing import Any

import psutil
import torch

from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, UnsupportedModelError

MEMORY_SHARES = {"cuda": 0.8}
"""Of the free memory that a pool of the pipeline's own takes at most, by device type;"""
MEMORY_SHARE_ELSEWHERE = 0.25
MAX_NUM_SEQS = {"cuda": 256}
MAX_NUM_SEQS_ELSEWHERE = 32
UNKNOWN_CONTEXT = 32768
"""Tokens, for models that name no longest context."""

UNFINISHED_PER_SEQ, READ_AHEAD_PER_SEQ = 2, 8
"""Requests under way, and inputs read ahead of what is taken, per sequence that can run at once."""


def _keywords(function: Any) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


SETTINGS = _keywords(ContinuousBatcher.__init__) - {"policy", "tokenizer"}
"""Of the batcher, which the pipeline takes, too."""
REFUSED = {"max_queue_size"}
"""Settings that have a reason of their own why they cannot be honoured."""
REQUEST_OPTIONS = _keywords(ContinuousBatcher.submit) - {"adapter_name"} | {"adapter_names"}
"""Of a request, which a call takes, too: one for all inputs, or a list with one for each."""
PER_INPUT = REQUEST_OPTIONS | {"max_new_tokens", "streamer"}
CALL_OPTIONS = {"read_ahead", "return_errors", "progress_bar"}


def require_generating(model: Any) -> None:
    """Raises `UnsupportedModelError` for a model that does not generate."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} generates no text: a model for causal LM is needed.")


def max_num_seqs_of(value: Any, device: str) -> int:
    """How many sequences run at once, which the other limits follow."""
    if value is None:
        return MAX_NUM_SEQS.get(device, MAX_NUM_SEQS_ELSEWHERE)
    if not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"max_num_seqs={value!r:.100}: a whole number of at least 1 is needed, or None.")
    return value


def read_ahead_of(value: Any, is_eager: bool, max_num_seqs: int) -> int | None:
    """How many inputs may be read and not taken; None for any number, where somebody waits for all of them."""
    if value is None:
        return None if is_eager else READ_AHEAD_PER_SEQ * max_num_seqs
    if not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"read_ahead={value!r}: a whole number of at least 1 is needed, or None.")
    return value


def device_type(model: Any, pool: BlockPool | None) -> str:
    """Of the device where the model begins to compute: what it offloads is on none."""
    some = pool if isinstance(pool, BlockPool) else BlockPool.for_model(model, num_blocks=1)
    return some.device.type


def make_pool(model: Any, memory: int | float | str | None, max_num_seqs: int) -> BlockPool:
    """A pool of the pipeline's own; without `memory`, one for `max_num_seqs` longest contexts, if there is so much; or a share of each of several devices."""
    if memory is not None:
        return BlockPool.for_model(model, memory=memory)
    one_block = BlockPool.for_model(model, num_blocks=1)
    if len(one_block.devices) > 1:
        return BlockPool.for_model(model, memory=MEMORY_SHARES.get(one_block.device.type, MEMORY_SHARE_ELSEWHERE))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or UNKNOWN_CONTEXT
    wanted = max_num_seqs * context * one_block.bytes_per_token
    share = MEMORY_SHARES.get(one_block.device.type, MEMORY_SHARE_ELSEWHERE)
    is_gpu = one_block.device.type == "cuda"
    free = torch.cuda.mem_get_info(one_block.device)[0] if is_gpu else psutil.virtual_memory().available
    return BlockPool.for_model(model, memory=max(min(wanted, int(share * free)), one_block.nbytes, 1))
