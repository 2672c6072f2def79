"""What the inputs of a forward say about its rows: padding, token ids, positions."""

from dataclasses import dataclass

import torch

from .errors import InvalidRequestError


@dataclass(frozen=True)
class Prompt:
    """The new columns of a forward.

    Attributes:
        batch, q_len: Their shape.
        start: Columns before them.
        pads: Per row the columns of left padding so far.
        tokens: Per row the ids of its new tokens, without padding; None if the ids are not known.
        is_regular: Whether the mask hides left padding and nothing else.
    """

    batch: int
    q_len: int
    start: int
    pads: list[int]
    tokens: list[list[int]] | None
    is_regular: bool
    right_padded_row: int | None = None
    uncovered_row: int | None = None

    @classmethod
    def read(
        cls,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        start: int,
        shape: tuple[int, int] | None = None,
        known_pads: list[int] | None = None,
    ) -> "Prompt":
        """Reads `input_ids` `[batch, q_len]` and a mask over all columns, `[batch, start + q_len]` or None."""
        batch, q_len = shape or tuple(input_ids.shape)  # type: ignore[union-attr]
        end = start + q_len
        pads = list(known_pads or [0] * batch)
        is_regular, right_padded_row, uncovered_row = True, None, None
        if attention_mask is not None:
            uncovered_row = _uncovered_row(attention_mask, batch, end, pads) if start else None
            pads, is_regular, right_padded_row = _read_mask(attention_mask, batch, start, end, pads)
        tokens = None
        if input_ids is not None:
            tokens = [row[max(pad - start, 0) :] for row, pad in zip(input_ids.tolist(), pads, strict=True)]
        return cls(batch, q_len, start, pads, tokens, is_regular, right_padded_row, uncovered_row)

    def require_left_padding(self) -> None:
        """Raises `InvalidRequestError` if a row is padded on the right, or shows what was padding before."""
        if self.right_padded_row is not None:
            raise InvalidRequestError(
                f"row {self.right_padded_row} is padded on the right: its last token is masked. Generation needs padding "
                "on the left: tokenizer.padding_side = 'left'."
            )
        if self.uncovered_row is not None:
            raise InvalidRequestError(
                f"row {self.uncovered_row}: the attention mask shows tokens that it hid as padding before, and the cache did "
                "not store them. Pass the mask of the earlier forwards, with ones for the new tokens."
            )

    def has_positions(self, position_ids: torch.Tensor | None) -> bool:
        """Whether the new tokens' positions count each row's tokens from 0, padding left out."""
        if position_ids is None:
            return not any(self.pads)
        if self.q_len == 1 and position_ids.shape == (self.batch, 1):  # a decoding step: lists are faster than tensors
            return all(
                p == self.start - pad or pad > self.start
                for (p,), pad in zip(position_ids.tolist(), self.pads, strict=True)
            )
        positions = position_ids.reshape(-1, position_ids.shape[-1])
        if positions.shape[-1] != self.q_len or (positions.shape[0] % self.batch and positions.shape[0] != 1):
            return False
        columns = torch.arange(self.start, self.start + self.q_len, device=positions.device)
        expected = columns - torch.tensor(self.pads, device=positions.device)[:, None]
        expected = expected.repeat(max(positions.shape[0] // self.batch, 1), 1)
        return bool(((positions == expected) | (expected < 0)).all())


def _uncovered_row(mask: torch.Tensor, batch: int, end: int, pads: list[int]) -> int | None:
    """The first row whose mask shows a column that is padding in the cache."""
    if mask.dim() != 2 or tuple(mask.shape) != (batch, end) or not any(pads):
        return None
    columns = torch.arange(end, device=mask.device)
    shown = ((mask != 0) & (columns < torch.tensor(pads, device=mask.device)[:, None])).any(1)
    return next((row for row, is_shown in enumerate(shown.tolist()) if is_shown), None)


def _read_mask(
    mask: torch.Tensor, batch: int, start: int, end: int, pads: list[int]
) -> tuple[list[int], bool, int | None]:
    """Padding per row, whether there is nothing but left padding, and the first row whose last token is masked."""
    if mask.dim() != 2 or tuple(mask.shape) != (batch, end):
        return pads, False, None
    if not any(pads) and mask.all():  # nothing is padded, as in most decoding steps: one look is enough
        return pads, True, None
    visible = mask != 0
    counts = visible.sum(1)
    firsts = torch.where(counts > 0, visible.int().argmax(1), end).tolist()
    is_left_padded = [first + count == end for first, count in zip(firsts, counts.tolist(), strict=True)]
    right_padded = next((i for i, row in enumerate(visible[:, -1].tolist()) if not row and counts[i] > 0), None)
    if not all(is_left_padded):
        return pads, False, right_padded
    # columns that were stored as tokens before stay tokens, whatever the mask says now
    agrees = all(first == pad or pad == start <= first for first, pad in zip(firsts, pads, strict=True))
    return (firsts, True, None) if agrees or start == 0 else (pads, False, None)
