"""What whole blocks hold of one layer, in an order that is the same on every device."""

import torch

from ..kernels.quantized import as_bytes
from .storage import LayerBlocks

KINDS = ("keys", "values", "key_scales", "value_scales")
"""The tensors of a layer, by their names in `LayerBlocks`; the last two are there in pools of 8 bits."""


def read_blocks(layer: LayerBlocks, blocks: list[int]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, by kind: `[len(blocks), block_size, heads, dim]`, scales without the last dimension."""
    content = {}
    for kind, source in _tensors(layer).items():
        found = as_bytes(source)[torch.tensor(blocks, dtype=torch.int64, device=source.device)]
        content[kind] = found.contiguous().cpu().view(source.dtype)
    return content


def write_blocks(layer: LayerBlocks, blocks: list[int], content: dict[str, torch.Tensor], rows: list[int]) -> None:
    """Block `blocks[i]` gets row `rows[i]` of each of the tensors that `read_blocks` gave."""
    for kind, target in _tensors(layer).items():
        places = torch.tensor(blocks, dtype=torch.int64, device=target.device)
        as_bytes(target)[places] = as_bytes(content[kind])[rows].to(target.device)


def _tensors(layer: LayerBlocks) -> dict[str, torch.Tensor]:
    found = {kind: getattr(layer, kind) for kind in KINDS}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}
