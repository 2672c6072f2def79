"""Which layer's K and V lie where in a block. Plain Python."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True)
class LayerSpec:
    """K and V of one layer, per token.

    Attributes:
        window: How many tokens, the newest included, the layer's cache can see; None for all.
        key_heads, key_dim: Shape of one token's key.
        value_heads, value_dim: Shape of one token's value. A dimension may be 0.
    """

    window: int | None
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def key_numel(self) -> int:
        """Elements of one token's key."""
        return self.key_heads * self.key_dim

    @property
    def value_numel(self) -> int:
        """Elements of one token's value."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Place:
    """Where a layer lives: its group's block table, and the part of each block, in a slab, that is the layer's."""

    group: int
    slab: int
    part: int


@dataclass(frozen=True)
class PoolLayout:
    """A pool is `num_slabs` pairs of tensors; entry `i` of each belongs to block `i`.

    On each device a group has at most as many layers as the slabs there have parts, so that any block id can serve any
    group. An entry has room for the largest layer (`key_numel` and `value_numel` elements per token); smaller layers share
    one entry where they fit.

    Attributes:
        windows: Per group its layers' window; layers of one group share a block table.
        places: Layer index to place. Layers without K and V are not in it.
        slab_devices: Per slab where it is, as `plan_layout` was told.
    """

    specs: Mapping[int, LayerSpec]
    places: Mapping[int, Place]
    windows: tuple[int | None, ...]
    slab_devices: tuple[Hashable, ...]
    key_numel: int
    value_numel: int

    @property
    def num_slabs(self) -> int:
        """Pairs of tensors on all devices."""
        return len(self.slab_devices)

    @property
    def numel_per_token(self) -> int:
        """Elements that one token takes in all layers, without unused parts of entries."""
        return sum(spec.key_numel + spec.value_numel for spec in self.specs.values())

    @property
    def entry_numel_per_token(self) -> int:
        """Elements per token of one block id, over all slabs, unused parts included."""
        return self.num_slabs * (self.key_numel + self.value_numel)

    @property
    def key_vectors(self) -> int:
        """Keys (of one head each) that an entry has room for, per token: as many scales it needs where K has 8 bits."""
        return max(((place.part + 1) * self.specs[i].key_heads for i, place in self.places.items()), default=0)

    @property
    def value_vectors(self) -> int:
        """Likewise for values."""
        return max(((place.part + 1) * self.specs[i].value_heads for i, place in self.places.items()), default=0)

    def bytes_per_token(self, itemsize: int, scale_itemsize: int = 0) -> int:
        """Bytes that one token takes in all layers, without unused parts of entries.

        Args:
            itemsize: Bytes of an element.
            scale_itemsize: Bytes of the scale of each key and value; 0 if they have none.
        """
        vectors = sum(spec.key_heads + spec.value_heads for spec in self.specs.values())
        return self.numel_per_token * itemsize + vectors * scale_itemsize

    def entry_bytes_per_token(self, itemsize: int, scale_itemsize: int = 0) -> int:
        """Bytes per token of one block id, over all slabs, unused parts included."""
        scales = self.num_slabs * (self.key_vectors + self.value_vectors)
        return self.entry_numel_per_token * itemsize + scales * scale_itemsize

    def entry_bytes_by_device(self, itemsize: int, scale_itemsize: int = 0) -> dict[Hashable, int]:
        """`entry_bytes_per_token`, divided among the devices."""
        per_slab = self.entry_bytes_per_token(itemsize, scale_itemsize) // max(self.num_slabs, 1)
        return {device: count * per_slab for device, count in Counter(self.slab_devices).items()}

    def device_of(self, layer: int) -> Hashable:
        """Where a layer's slab is."""
        return self.slab_devices[self.places[layer].slab]

    def with_spec(self, layer: int, spec: LayerSpec) -> "PoolLayout":
        """The same groups with one layer's shapes corrected; every layer then has an entry of its own."""
        specs = {**self.specs, layer: spec}
        ranks: dict[int, int] = {}
        counts: Counter[tuple[int, Hashable]] = Counter()
        slabs: dict[Hashable, int] = dict.fromkeys(self.slab_devices, 0)
        for index, place in self.places.items():
            device = self.device_of(index)
            ranks[index] = counts[place.group, device]
            counts[place.group, device] += 1
            slabs[device] = max(slabs[device], counts[place.group, device])
        firsts = _firsts(slabs)
        return replace(
            self,
            specs=specs,
            places={i: Place(p.group, firsts[self.device_of(i)] + ranks[i], 0) for i, p in self.places.items()},
            slab_devices=_slab_devices(slabs),
            key_numel=max(s.key_numel for s in specs.values()),
            value_numel=max(s.value_numel for s in specs.values()),
        )


GROUP_COST = 0.02
"""Bookkeeping of one more group, as a share of the KV memory: splitting 48 + 12 layers into 5 groups of 12 pays off,
splitting them into 30 groups of 2 to save the last padding does not."""


Layers = dict[Hashable, list[int]]
"""Layers of one window and shape, by device."""


def plan_layout(specs: Mapping[int, LayerSpec], devices: Mapping[int, Hashable] | None = None) -> PoolLayout:
    """Puts layers into groups (layers of one window and shape each) with little unused memory.

    Args:
        specs: K and V per layer.
        devices: Per layer where its slab has to be; None where all of them are in one place.
    """
    classes: dict[LayerSpec, Layers] = defaultdict(lambda: defaultdict(list))
    for layer, spec in specs.items():
        classes[spec][devices[layer] if devices is not None else None].append(layer)
    if not classes:
        return PoolLayout({}, {}, (), (), 0, 0)
    key_numel = max(spec.key_numel for spec in classes)
    value_numel = max(spec.value_numel for spec in classes)
    parts = {spec: _parts(spec, key_numel, value_numel) for spec in classes}
    slabs = _plan_slabs(classes, parts, key_numel + value_numel)
    firsts = _firsts(slabs)
    places: dict[int, Place] = {}
    windows: list[int | None] = []
    for spec, by_device in classes.items():
        for device, layers in by_device.items():
            for i, layer in enumerate(layers):
                group, rest = divmod(i, slabs[device] * parts[spec])
                part, slab = divmod(rest, slabs[device])
                places[layer] = Place(len(windows) + group, firsts[device] + slab, part)
        windows += [spec.window] * _num_groups(by_device, slabs, parts[spec])
    return PoolLayout(dict(specs), places, tuple(windows), _slab_devices(slabs), key_numel, value_numel)


def _plan_slabs(classes: Mapping[LayerSpec, Layers], parts: Mapping[LayerSpec, int], numel: int) -> dict[Hashable, int]:
    """Slabs per device that take the least memory for all groups together.

    Args:
        classes: All layers.
        parts: How many layers of each class fit into one entry.
        numel: Elements of an entry, per token.
    """
    counts = {spec: sum(map(len, by_device.values())) for spec, by_device in classes.items()}
    used = sum((spec.key_numel + spec.value_numel) * count for spec, count in counts.items())

    def slabs_for(total: int) -> dict[Hashable, int]:
        slabs: dict[Hashable, int] = defaultdict(int)
        for spec, by_device in classes.items():
            groups = _ceil(counts[spec], total * parts[spec])
            for device, layers in by_device.items():
                slabs[device] = max(slabs[device], _ceil(_ceil(len(layers), groups), parts[spec]))
        return slabs

    def cost(slabs: Mapping[Hashable, int]) -> tuple[float, int]:
        groups = sum(_num_groups(by_device, slabs, parts[spec]) for spec, by_device in classes.items())
        total = sum(slabs.values())
        return groups * total * numel / max(used, 1) + GROUP_COST * groups, -total

    return min(map(slabs_for, range(1, max(counts.values()) + 1)), key=cost)


def _num_groups(layers: Layers, slabs: Mapping[Hashable, int], parts: int) -> int:
    """Groups of a class, if each is as full as the slabs of some device allow."""
    return max(_ceil(len(on_device), slabs[device] * parts) for device, on_device in layers.items())


def _firsts(slabs: Mapping[Hashable, int]) -> dict[Hashable, int]:
    """The number of each device's first slab."""
    return dict(zip(slabs, accumulate(slabs.values(), initial=0), strict=False))


def _slab_devices(slabs: Mapping[Hashable, int]) -> tuple[Hashable, ...]:
    return tuple(device for device, count in slabs.items() for _ in range(count))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _parts(spec: LayerSpec, key_numel: int, value_numel: int) -> int:
    """How many layers of this shape fit into one entry."""
    ratios = [
        whole // part for whole, part in ((key_numel, spec.key_numel), (value_numel, spec.value_numel)) if part > 0
    ]
    return min(ratios, default=1)
