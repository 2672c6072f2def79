"""The tensors behind the blocks.

Layout: per slab one tensor for K and one for V, `[num_blocks, block_size * numel]`; a layer sees its part of each entry
as `[num_blocks, block_size, heads, head_dim]`, tokens of a block next to each other (NHD). Blocks of one layer are
contiguous, so that a run of blocks is a dense tensor, a gather is one `index_select` of whole tokens, and a layer's slab
can live on the layer's device. Kernels take any strides: the layout is decided here and nowhere else.
"""

from dataclasses import dataclass

import torch

from .layout import LayerSpec, Place, PoolLayout


@dataclass(frozen=True)
class LayerBlocks:
    """One layer's view of the storage.

    Attributes:
        keys: `[num_blocks, block_size, key_heads, key_dim]`.
        values: `[num_blocks, block_size, value_heads, value_dim]`.
        flat_keys, flat_values: The same memory as `[num_blocks * block_size, heads, dim]`, None where a layer shares
            its entries with others and slots are not evenly spaced.
    """

    keys: torch.Tensor
    values: torch.Tensor
    flat_keys: torch.Tensor | None
    flat_values: torch.Tensor | None


class KVStorage:
    """K and V of all layers. The only class that writes them; it knows nothing of who owns a block.

    Args:
        layout: Which layer lies where.
        num_blocks: Blocks in the pool.
        block_size: Tokens per block.
        dtype: Of K and V.
        device: Of all slabs.
    """

    def __init__(
        self, layout: PoolLayout, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.dtype, self.device = dtype, device
        self._allocate(layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for pair in self._slabs for slab in pair)

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes tokens.

        Args:
            layer: Layer index.
            slots: int64 `[num_tokens]` on the storage's device, all different.
            keys: `[num_tokens, key_heads, key_dim]`.
            values: `[num_tokens, value_heads, value_dim]`.
        """
        blocks = self.layers[layer]
        self._write(blocks.keys, blocks.flat_keys, slots, keys)
        self._write(blocks.values, blocks.flat_values, slots, values)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads tokens: `slots` int64 `[num_tokens]` to `[num_tokens, heads, dim]` of K and of V."""
        blocks = self.layers[layer]
        return self._read(blocks.keys, blocks.flat_keys, slots), self._read(blocks.values, blocks.flat_values, slots)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, `(source, destination)` each, all layers at once."""
        if not pairs:
            return
        source, destination = torch.tensor(pairs, device=self.device).unbind(1)
        for pair in self._slabs:
            for slab in pair:
                slab.index_copy_(0, destination, slab.index_select(0, source))

    def fill_blocks(self, blocks: list[int], value: float) -> None:
        """Overwrites whole blocks, so that a read of a block that was given back shows."""
        for pair in self._slabs:
            for slab in pair:
                slab[blocks] = value

    def relayout(self, layout: PoolLayout) -> None:
        """Moves to another layout of the same layers, with the content of those whose shapes stay."""
        old = self.layers
        self._allocate(layout)
        for layer, blocks in self.layers.items():
            if old[layer].keys.shape == blocks.keys.shape and old[layer].values.shape == blocks.values.shape:
                blocks.keys.copy_(old[layer].keys)
                blocks.values.copy_(old[layer].values)

    def _allocate(self, layout: PoolLayout) -> None:
        slabs = [(self._slab(layout.key_numel), self._slab(layout.value_numel)) for _ in range(layout.num_slabs)]
        self.layout, self._slabs = layout, slabs
        self.layers = {layer: self._layer(layout.specs[layer], place) for layer, place in layout.places.items()}

    def _slab(self, numel: int) -> torch.Tensor:
        with torch.inference_mode(False):  # a pool made in inference mode also serves `generate`, which is not
            return torch.empty(self.num_blocks, self.block_size * numel, dtype=self.dtype, device=self.device)

    def _layer(self, spec: LayerSpec, place: Place) -> LayerBlocks:
        key_slab, value_slab = self._slabs[place.slab]
        keys = self._part(key_slab, place.part, spec.key_heads, spec.key_dim)
        values = self._part(value_slab, place.part, spec.value_heads, spec.value_dim)
        return LayerBlocks(keys, values, _flat(keys), _flat(values))

    def _part(self, slab: torch.Tensor, part: int, heads: int, dim: int) -> torch.Tensor:
        numel = self.block_size * heads * dim
        entry = slab[:, part * numel : (part + 1) * numel]
        return entry.view(self.num_blocks, self.block_size, heads, dim)

    def _write(self, blocks: torch.Tensor, flat: torch.Tensor | None, slots: torch.Tensor, new: torch.Tensor) -> None:
        if new.dtype != self.dtype:
            new = new.to(self.dtype)
        if flat is not None:
            flat.index_copy_(0, slots, new)
        else:
            blocks[slots // self.block_size, slots % self.block_size] = new

    def _read(self, blocks: torch.Tensor, flat: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        if flat is not None:
            return flat.index_select(0, slots)
        return blocks[slots // self.block_size, slots % self.block_size]


def _flat(blocks: torch.Tensor) -> torch.Tensor | None:
    is_even = blocks.numel() > 0 and blocks.stride(0) == blocks.shape[1] * blocks.stride(1)
    return blocks.flatten(0, 1) if is_even else None
