"""The memory of a plan: what there is, what is kept free, what the weights take, and what is left."""

from typing import Any

import torch

from ..errors import InvalidRequestError
from ..sizes import as_share, parse_memory, unit_hint
from ..wording import format_bytes
from .weights import Weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_and_reserve(memory: Any, overhead: float) -> tuple[int, int]:
    """All bytes, and those kept free."""
    if not 0 <= overhead < 1:
        raise InvalidRequestError(
            f"overhead is {overhead!r}; it is a share of the memory, from 0 to below 1, such as 0.1."
        )
    total = parse_memory(1.0 if memory is None else memory, DEVICE)
    if hint := unit_hint(memory):
        raise InvalidRequestError(f"memory is {memory!r}: nothing fits.{hint}")
    return total, int(total * overhead)


def source_of(memory: Any) -> str:
    """Whose memory a share, or nothing, stands for."""
    share = as_share(1.0 if memory is None else memory)
    if not isinstance(share, float):
        return ""
    where = "the GPU of this machine" if DEVICE.type == "cuda" else "the RAM of this machine, which has no GPU"
    part = "what" if share == 1 else f"{share:.0%} of what"
    return f"{part} is free now in {where}; --memory plans for another one"


def given_weights(weights_memory: Any, with_weights: bool) -> tuple[int, str] | None:
    """Bytes of the weights, and who says so; None if they are to be computed."""
    if not with_weights:
        if weights_memory is not None:
            raise InvalidRequestError(
                f"weights_memory is {weights_memory!r}, but the weights are left out (--no-weights): give one of the two."
            )
        return 0, "not in this memory"
    if weights_memory is None:
        return None
    if isinstance(as_share(weights_memory), float):
        raise InvalidRequestError(
            f"weights_memory is {weights_memory!r}; it is no share: give bytes, or write it like '16GB'."
        )
    nbytes = parse_memory(weights_memory, torch.device("cpu"), "weights_memory")
    if hint := unit_hint(weights_memory):
        raise InvalidRequestError(f"weights_memory is {weights_memory!r}: no model is that small.{hint}")
    return nbytes, "as given"


def available(total: int, reserve: int, weights: Weights) -> int:
    """Bytes for K, V and states."""
    missing = weights.nbytes + reserve - total
    if missing >= 0:
        raise InvalidRequestError(
            f"memory is {format_bytes(total)}: the weights take {format_bytes(weights.nbytes)} ({weights.note}) and "
            f"{format_bytes(reserve)} are kept for activations, {format_bytes(missing)} more than there is and nothing left for K and "
            "V. Take more memory, a smaller dtype, quantised weights, a smaller overhead, or leave the weights out if they are "
            "elsewhere."
        )
    return -missing
