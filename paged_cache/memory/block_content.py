"""What whole blocks hold of one layer, in an order that is the same on every device."""

from dataclasses import replace

import torch

from ..kernels.quantized import as_bytes
from .host_storage import HostStorage
from .storage import KVStorage, LayerBlocks

KINDS = ("keys", "values", "key_scales", "value_scales")
"""The tensors of a layer, by their names in `LayerBlocks`; the last two are there in pools of 8 bits."""


def read_blocks(layer: LayerBlocks, blocks: list[int]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, by kind: `[len(blocks), block_size, heads, dim]`, scales without the last dimension."""
    content = {}
    for kind, source in _tensors(layer).items():
        found = as_bytes(source)[torch.tensor(blocks, dtype=torch.int64, device=source.device)]
        content[kind] = found.contiguous().cpu().view(source.dtype)
    return content


def read_anywhere(
    storage: KVStorage, host: HostStorage | None, layer: int, places: list[tuple[int | None, int | None]]
) -> dict[str, torch.Tensor]:
    """`read_blocks` of (block, host block) pairs: from host memory where there is no block of the pool."""
    here = [(row, block) for row, (block, _) in enumerate(places) if block is not None]
    away = [(row, other) for row, (block, other) in enumerate(places) if block is None and other is not None]
    content = read_blocks(storage.layers[layer], [block for _, block in here])
    if not away or host is None:
        return content
    if storage.device_of(layer).type == "cuda":
        torch.cuda.synchronize(storage.device_of(layer))  # copies to host memory may still be under way
    rest = read_blocks(_on_host(storage, host, layer), [block for _, block in away])
    order = torch.tensor([row for row, _ in (*here, *away)]).argsort()
    return {
        kind: torch.cat([as_bytes(found), as_bytes(rest[kind])])[order].view(found.dtype)
        for kind, found in content.items()
    }


def write_blocks(layer: LayerBlocks, blocks: list[int], content: dict[str, torch.Tensor], rows: list[int]) -> None:
    """Block `blocks[i]` gets row `rows[i]` of each of the tensors that `read_blocks` gave."""
    for kind, target in _tensors(layer).items():
        places = torch.tensor(blocks, dtype=torch.int64, device=target.device)
        as_bytes(target)[places] = as_bytes(content[kind])[rows].to(target.device)


def _tensors(layer: LayerBlocks) -> dict[str, torch.Tensor]:
    found = {kind: getattr(layer, kind) for kind in KINDS}
    return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def _on_host(storage: KVStorage, host: HostStorage, layer: int) -> LayerBlocks:
    """A layer's view of the host blocks, which are laid out like those of the pool."""
    slabs = [slab for of_device in storage.slabs.values() for slab in of_device]
    blocks, moved = storage.layers[layer], {}
    for kind, view in _tensors(blocks).items():
        start = view.untyped_storage().data_ptr()
        (number, *_) = [i for i, slab in enumerate(slabs) if slab.untyped_storage().data_ptr() == start]
        copy = host.slabs[number]
        moved[kind] = copy.as_strided((copy.shape[0], *view.shape[1:]), view.stride(), view.storage_offset())
    return replace(blocks, **moved, flat_keys=None, flat_values=None)
