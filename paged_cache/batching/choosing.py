"""Output processing of a step: logits to tokens, for all requests that are ready, in as few calls as there are kinds."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import torch

from .decoding import Decoding
from .user_code import RAISED, as_error

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
        if decoding.chosen is not None:
            choices[i] = decoding.chosen
        elif not decoding.is_plain:
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
            parts.append(decoding.process(own_logits))
            ready.append(i)
            raw.append(own_logits)
        except RAISED as raised:
            choices[i] = as_error(raised)
    if not ready:
        return choices
    first = decodings[ready[0]]
    scores = torch.cat(parts) if len(parts) > 1 else parts[0]
    input_ids = _padded([decodings[i].input_ids for i in ready]) if first.shares_ids else None
    for processor in first.shared:
        scores = processor(input_ids, scores)
    pieces = scores.split([len(part) for part in parts])
    found = _sample([decodings[i] for i in ready], scores, pieces) if first.do_sample else _argmax(scores, pieces)
    for i, choice, own_logits, piece in zip(ready, found, raw, pieces, strict=True):
        choices[i] = choice
        if isinstance(choice, list):
            decodings[i].chosen = choice
            decodings[i].keep(own_logits, piece)
    return choices


def _argmax(scores: torch.Tensor, pieces: Sequence[torch.Tensor]) -> Iterator[Choice]:
    tokens = iter(scores.argmax(-1).tolist())
    return (list(islice(tokens, len(piece))) for piece in pieces)


def _sample(decodings: list[Decoding], scores: torch.Tensor, pieces: Sequence[torch.Tensor]) -> Iterator[Choice]:
    """Each request draws from its own random numbers, in the way of `generate`, and when it is asked for."""
    probabilities, sizes = torch.nn.functional.softmax(scores, dim=-1), [len(piece) for piece in pieces]
    are_sound = _are_sound(probabilities, sizes) if scores.is_cuda else [True] * len(sizes)
    parts = zip(decodings, probabilities.split(sizes), are_sound, strict=True)
    return (_draw(decoding, part, is_sound) for decoding, part, is_sound in parts)


def _are_sound(probabilities: torch.Tensor, sizes: list[int]) -> list[bool]:
    """Per request whether its rows can be drawn from: a GPU does not say so but ends the process."""
    flags = torch.isfinite(probabilities.sum(-1)).split(sizes)
    return torch.stack([flag.all() for flag in flags]).tolist()


def _draw(decoding: Decoding, probabilities: torch.Tensor, is_sound: bool) -> Choice:
    if not is_sound:
        return RuntimeError("the scores are NaN, infinite, or all -inf: there is no token to draw.")
    try:
        return torch.multinomial(probabilities, 1, generator=decoding.generator)[:, 0].tolist()
    except RuntimeError as error:  # probabilities that are none: only this request made them
        return error


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """int64 `[num_rows, longest]`: rows of different lengths, filled up with their own first token, which changes no set."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([torch.cat([row, row[:, :1].expand(-1, longest - row.shape[1])], dim=1) for row in rows])


def _rows(logits: torch.Tensor, places: list[int]) -> torch.Tensor:
    """float32 `[num_rows, vocab_size]`; zeros for complete sequences, so that sampling goes on as `generate`'s does."""
    if len(places) == 1:
        return logits[places[0]][None].float()
    rows = logits[[max(place, 0) for place in places]].float()
    rows[[place < 0 for place in places]] = 0
    return rows
