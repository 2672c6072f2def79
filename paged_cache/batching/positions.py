"""How many positions a model has, and what becomes of requests that want more."""

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from ..compat import logger, text_config
from ..errors import InvalidRequestError
from .decoding import read_criteria

NAMES = ("max_position_embeddings", "max_target_positions")
"""What a config calls the number of positions."""

MOST_PADDING = 8
"""Entries that tables of positions have beyond a model's positions: two in OPT and Bart."""


class Positions:
    """What a model's number of positions means for its requests.

    Models that look positions up in a table cannot go beyond it; on a GPU the attempt would end the process. Others compute
    positions, and are only worse there than what they were trained for: `generate` warns, and so does this, once.

    Args:
        model: The model that generates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        counts = (getattr(text_config(model.config), name, None) for name in NAMES)
        self._count = next((count for count in counts if isinstance(count, int) and count > 0), None)
        self._name, self._has_warned = type(model).__name__, False
        self._has_table = any(0 <= size - (self._count or 2**62) <= MOST_PADDING for size in _table_sizes(model))

    def require_room(self, prompt_ids: list[int]) -> None:
        """Raises `InvalidRequestError` for a prompt that is longer than a table of positions."""
        if self._has_table and self._count is not None and len(prompt_ids) > self._count:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_ids)} tokens, {self._name} has {self._count} positions "
                "(max_position_embeddings): shorten it."
            )

    def limit(self, criteria: StoppingCriteriaList) -> None:
        """Ends a request where a table of positions ends, with one token that nobody has to read."""
        max_length = read_criteria(criteria)[0]
        if self._count is None or max_length <= self._count + self._has_table:
            return
        if self._has_table:
            criteria.append(MaxLengthCriteria(self._count + 1))
        if not self._has_warned:
            self._has_warned = True
            consequence = "it ends there" if self._has_table else "answers may be worse there, or without sense"
            about = (max_length, self._name, self._count, consequence)
            logger.warning("a request may have %d tokens, %s has %d positions (max_position_embeddings): %s", *about)


def _table_sizes(model: PreTrainedModel) -> Iterator[int]:
    """Entries of all that may be a table of positions, in the decoder; one that grows with its inputs is called `weights`."""
    decoder = model.get_decoder()
    tables = {name: module.weight for name, module in decoder.named_modules() if isinstance(module, torch.nn.Embedding)}
    buffers = {name: buffer for name, buffer in decoder.named_buffers() if buffer.dim() == 2}
    for name, table in (tables | buffers).items():
        if re.search("pos|wpe", name.rpartition(".")[2]):
            yield len(table)
