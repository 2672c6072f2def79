"""Output processing of a step: logits to tokens, for all requests that are ready, in as few calls as there are kinds."""

from collections import defaultdict
from collections.abc import Hashable
from typing import TypeAlias

import torch

from .decoding import Decoding

Choice: TypeAlias = list[int] | Exception
"""The next token of each sequence, or what a processor raised."""


def choose(decodings: list[Decoding], logits: torch.Tensor, places: list[list[int]]) -> list[Choice]:
    """The next tokens.

    Args:
        decodings: The requests that are ready.
        logits: `[num_ready, vocab_size]`.
        places: Per request and sequence, complete ones included, a row of `logits`; -1 for complete ones.
    """
    plain = [i for i, decoding in enumerate(decodings) if decoding.is_plain]
    choices: list[Choice] = [[] for _ in decodings]
    if plain:
        is_all = len(plain) == len(decodings) and len(plain) == len(logits)
        rows = logits if is_all else logits[[places[i][0] for i in plain]]
        best = rows.float().argmax(-1).tolist()
        order = [places[i][0] for i in plain] if is_all else range(len(plain))
        for i, k in zip(plain, order, strict=True):
            choices[i] = [best[k]]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, decoding in enumerate(decodings):
        if not decoding.is_plain:
            groups[decoding.shared_key, decoding.do_sample].append(i)
    for members in groups.values():
        found = _choose_alike([decodings[i] for i in members], logits, [places[i] for i in members])
        for i, choice in zip(members, found, strict=True):
            choices[i] = choice
    return choices


def _choose_alike(decodings: list[Decoding], logits: torch.Tensor, places: list[list[int]]) -> list[Choice]:
    """Requests with the same shared processors."""
    choices: list[Choice] = [[] for _ in decodings]
    ready: list[int] = []
    raw: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    for i, (decoding, rows) in enumerate(zip(decodings, places, strict=True)):
        own_logits = _rows(logits, rows)
        try:
            scores = own_logits.clone()
            parts.append(decoding.own(decoding.input_ids, scores) if decoding.own else scores)
            ready.append(i)
            raw.append(own_logits)
        except Exception as error:  # noqa: BLE001 (whatever a request's own processor raises is its own)
            choices[i] = error
    if not ready:
        return choices
    shared = decodings[ready[0]].shared
    sizes = [len(part) for part in parts]
    scores = torch.cat(parts) if len(parts) > 1 else parts[0]
    scores = shared(None, scores) if shared else scores  # type: ignore[arg-type]
    is_sampled = decodings[ready[0]].do_sample
    values = torch.nn.functional.softmax(scores, dim=-1) if is_sampled else scores
    best = None if is_sampled else scores.argmax(-1).split(sizes)
    for k, (i, part) in enumerate(zip(ready, values.split(sizes), strict=True)):
        decoding = decodings[i]
        decoding.keep(raw[k], scores.split(sizes)[k])
        try:
            tokens = torch.multinomial(part, 1, generator=decoding.generator)[:, 0] if best is None else best[k]
            choices[i] = tokens.tolist()
        except RuntimeError as error:  # probabilities that are none: only this request made them
            choices[i] = error
    return choices


def _rows(logits: torch.Tensor, places: list[int]) -> torch.Tensor:
    """float32 `[num_rows, vocab_size]`; zeros for complete sequences, so that sampling goes on as `generate`'s does."""
    if len(places) == 1:
        return logits[places[0]][None].float()
    rows = logits[[max(place, 0) for place in places]].float()
    rows[[place < 0 for place in places]] = 0
    return rows
