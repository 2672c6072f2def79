"""The tensors behind the blocks.

Layout: per slab, on the device of its layers, one tensor for K and one for V with an entry per block; a layer sees its part of each entry as
`[num_blocks, block_size, heads, head_dim]`. On the CPU the tokens of a block lie next to each other ("NHD"): a run of
blocks is a dense tensor and a gather one `index_select` of whole tokens. On CUDA the heads do ("HND"): what a kernel reads
of one head is contiguous. Either order works on either device; it is decided here and nowhere else, kernels take any
strides. Slabs of 8 bits have float32 scales beside them, per block, head and token, so that the scales of one head are
contiguous too.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import copy_blocks, write_kv
from ..kernels.quantized import LARGEST, as_bytes, dequantize, quantize
from . import huge_pages
from .layout import LayerSpec, PoolLayout

ORDERS = {"cuda": "HND"}
"""Order of the dimensions in a block by device type; "NHD" where it is not in here."""


@dataclass(frozen=True)
class LayerBlocks:
    """One layer's view of the storage.

    Attributes:
        keys: `[num_blocks, block_size, key_heads, key_dim]`.
        values: `[num_blocks, block_size, value_heads, value_dim]`.
        key_scales: float32 `[num_blocks, block_size, key_heads]`, the factor on each key of 8 bits; None for other dtypes.
        value_scales: Likewise for values.
        flat_keys, flat_values: The same memory as `[num_blocks * block_size, heads, dim]`, None where slots are not evenly
            spaced: a layer that shares its entries with others, the order HND.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
    flat_keys: torch.Tensor | None
    flat_values: torch.Tensor | None


@dataclass(frozen=True)
class Lane:
    """Layers of one group on one device: a forward's tensors (slots, block table, lengths) are theirs in common."""

    group: int
    device: torch.device


class KVStorage:
    """K and V of all layers. The only class that writes them, but for `HostStorage`, which brings blocks back.

    It knows nothing of who owns a block.

    Args:
        layout: Which layer lies where.
        num_blocks: Blocks in the pool.
        block_size: Tokens per block.
        dtype: In which K and V come back.
        device: Of the slabs for which the layout names none.
        kv_dtype: In which they are stored, `dtype` by default; int8 or float8_e4m3fn have scales.

    Attributes:
        slabs: Per device its tensors `[num_blocks, ...]`: K, V and scales of all its slabs.
        layers: Per layer its view.
        lanes: Each group on each of its devices.
        lane_of: Per layer the number of its lane.
    """

    def __init__(
        self,
        layout: PoolLayout,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.dtype, self.device = dtype, device
        self.kv_dtype = kv_dtype or dtype
        self._allocate(layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, scales included."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where slabs are, each once, in the order of the layers; `device` if there are none."""
        return tuple(dict.fromkeys(map(self.device_of, self.layers))) or (self.device,)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's blocks are."""
        return self.lanes[self.lane_of[layer]].device

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes tokens.

        Args:
            layer: Layer index.
            slots: int64 `[num_tokens]` on the layer's device, all different.
            keys: `[num_tokens, key_heads, key_dim]`.
            values: `[num_tokens, value_heads, value_dim]`.
        """
        blocks = self.layers[layer]
        if blocks.flat_keys is not None and blocks.flat_values is not None and blocks.key_scales is None:
            if keys.dtype is not self.kv_dtype or values.dtype is not self.kv_dtype:
                keys, values = keys.to(self.kv_dtype), values.to(self.kv_dtype)
            blocks.flat_keys.index_copy_(0, slots, keys)
            blocks.flat_values.index_copy_(0, slots, values)
        else:
            scales = {"key_scales": blocks.key_scales, "value_scales": blocks.value_scales}
            write_kv(keys, values, blocks.keys, blocks.values, slots, **scales)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads tokens: `slots` int64 `[num_tokens]` to `[num_tokens, heads, dim]` of K and of V, in `dtype`."""
        blocks = self.layers[layer]
        keys = self._read(blocks.keys, blocks.flat_keys, blocks.key_scales, slots)
        return keys, self._read(blocks.values, blocks.flat_values, blocks.value_scales, slots)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, `(source, destination)` each, all layers at once."""
        if pairs:
            for device, slabs in self.slabs.items():
                copy_blocks(slabs, slabs, torch.tensor(pairs, device=device))

    def fill_blocks(self, blocks: list[int], value: float) -> None:
        """Overwrites whole blocks, so that a read of a block that was given back shows."""
        codes = scale = torch.tensor([value])
        if self.kv_dtype in LARGEST:
            codes, scale = quantize(codes, self.kv_dtype)
        for slab in self._slabs:
            filling = codes.to(slab.dtype) if slab.dtype is self.kv_dtype else scale
            as_bytes(slab)[blocks] = as_bytes(filling.to(slab.device))

    def relayout(self, layout: PoolLayout) -> None:
        """Moves to another layout of the same layers, with the content of those whose shapes stay."""
        old = self.layers
        self._allocate(layout)
        for layer, blocks in self.layers.items():
            if old[layer].keys.shape == blocks.keys.shape and old[layer].values.shape == blocks.values.shape:
                for name in ("keys", "values", "key_scales", "value_scales"):
                    if (moved := getattr(blocks, name)) is not None:
                        moved.copy_(getattr(old[layer], name))

    def _allocate(self, layout: PoolLayout) -> None:
        devices = [self._device(device) for device in layout.slab_devices]
        slabs = [
            (
                self._slab(layout.key_numel, self.kv_dtype, device),
                self._slab(layout.value_numel, self.kv_dtype, device),
                self._scales(layout.key_vectors, device),
                self._scales(layout.value_vectors, device),
            )
            for device in devices
        ]
        self.layout, self._slabs = layout, [slab for four in slabs for slab in four if slab is not None]
        self.slabs: dict[torch.device, list[torch.Tensor]] = {}
        for slab in self._slabs:
            self.slabs.setdefault(slab.device, []).append(slab)
        self.layers = {
            layer: self._layer(layout.specs[layer], place.part, *slabs[place.slab])
            for layer, place in layout.places.items()
        }
        lanes = {i: Lane(place.group, self.layers[i].keys.device) for i, place in layout.places.items()}
        self.lanes = tuple(sorted(dict.fromkeys(lanes.values()), key=lambda lane: lane.group))
        self.lane_of = {layer: self.lanes.index(lane) for layer, lane in lanes.items()}

    def _device(self, device: Any) -> torch.device:
        return self.device if device is None else torch.device(device)

    def _slab(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        with torch.inference_mode(False):  # a pool made in inference mode also serves `generate`, which is not
            shape = self.num_blocks, self.block_size * numel
            if device.type == "cpu":
                return huge_pages.empty(shape, dtype)
            return torch.empty(shape, dtype=dtype, device=device)

    def _scales(self, num_vectors: int, device: torch.device) -> torch.Tensor | None:
        return self._slab(num_vectors, torch.float32, device) if self.kv_dtype in LARGEST else None

    def _layer(
        self,
        spec: LayerSpec,
        part: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_scales: torch.Tensor | None,
        value_scales: torch.Tensor | None,
    ) -> LayerBlocks:
        order = ORDERS.get(keys.device.type, "NHD")
        keys = self._part(keys, part, spec.key_heads, spec.key_dim, order)
        values = self._part(values, part, spec.value_heads, spec.value_dim, order)
        if key_scales is not None and value_scales is not None:
            key_scales = self._part(key_scales, part, spec.key_heads, 1, "HND")[..., 0]
            value_scales = self._part(value_scales, part, spec.value_heads, 1, "HND")[..., 0]
        return LayerBlocks(keys, values, key_scales, value_scales, _flat(keys), _flat(values))

    def _part(self, slab: torch.Tensor, part: int, heads: int, dim: int, order: str) -> torch.Tensor:
        """A layer's part of each entry, `[num_blocks, block_size, heads, dim]`."""
        numel = self.block_size * heads * dim
        entry = slab[:, part * numel : (part + 1) * numel]
        if order == "NHD":
            return entry.view(self.num_blocks, self.block_size, heads, dim)
        return entry.view(self.num_blocks, heads, self.block_size, dim).transpose(1, 2)

    def _read(
        self, blocks: torch.Tensor, flat: torch.Tensor | None, scales: torch.Tensor | None, slots: torch.Tensor
    ) -> torch.Tensor:
        if flat is not None and scales is None:
            return flat.index_select(0, slots).to(self.dtype)
        places = slots // self.block_size, slots % self.block_size
        found = as_bytes(blocks)[places].view(self.kv_dtype)
        return (found if scales is None else dequantize(found, scales[places])).to(self.dtype)


def itemsizes(kv_dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an element of K and V, and of the scale of each key and value (0 where there are none)."""
    return kv_dtype.itemsize, torch.float32.itemsize if kv_dtype in LARGEST else 0


def _flat(blocks: torch.Tensor) -> torch.Tensor | None:
    is_even = blocks.numel() > 0 and blocks.stride(0) == blocks.shape[1] * blocks.stride(1)
    return blocks.flatten(0, 1) if is_even else None
