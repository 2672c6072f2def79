"""Which layer's K and V lie where in a block. Plain Python."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace


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

    All groups have at most `num_slabs` x parts layers, so that any block id can serve any group. An entry has room for
    the largest layer (`key_numel` and `value_numel` elements per token); smaller layers share one entry where they fit.

    Attributes:
        windows: Per group its layers' window; layers of one group share a block table.
        places: Layer index to place. Layers without K and V are not in it.
    """

    specs: Mapping[int, LayerSpec]
    places: Mapping[int, Place]
    windows: tuple[int | None, ...]
    num_slabs: int
    key_numel: int
    value_numel: int

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

    def with_spec(self, layer: int, spec: LayerSpec) -> "PoolLayout":
        """The same groups with one layer's shapes corrected; every layer then has an entry of its own."""
        specs = {**self.specs, layer: spec}
        by_group: dict[int, int] = defaultdict(int)
        places = {}
        for index, place in self.places.items():
            places[index] = Place(place.group, by_group[place.group], 0)
            by_group[place.group] += 1
        return replace(
            self,
            specs=specs,
            places=places,
            num_slabs=max(by_group.values()),
            key_numel=max(s.key_numel for s in specs.values()),
            value_numel=max(s.value_numel for s in specs.values()),
        )


GROUP_COST = 0.02
"""Bookkeeping of one more group, as a share of the KV memory: splitting 48 + 12 layers into 5 groups of 12 pays off,
splitting them into 30 groups of 2 to save the last padding does not."""


def plan_layout(specs: Mapping[int, LayerSpec]) -> PoolLayout:
    """Puts layers into groups of equal size (layers of one window and shape each) with little unused memory."""
    classes: dict[LayerSpec, list[int]] = defaultdict(list)
    for layer, spec in specs.items():
        classes[spec].append(layer)
    if not classes:
        return PoolLayout({}, {}, (), 0, 0, 0)
    key_numel = max(spec.key_numel for spec in classes)
    value_numel = max(spec.value_numel for spec in classes)
    parts = {spec: _parts(spec, key_numel, value_numel) for spec in classes}

    def num_groups(num_slabs: int) -> int:
        return sum(-(-len(layers) // (num_slabs * parts[spec])) for spec, layers in classes.items())

    used = sum((spec.key_numel + spec.value_numel) * len(layers) for spec, layers in classes.items())

    def cost(num_slabs: int) -> float:
        groups = num_groups(num_slabs)
        return groups * num_slabs * (key_numel + value_numel) / max(used, 1) + GROUP_COST * groups

    num_slabs = min(range(1, max(len(layers) for layers in classes.values()) + 1), key=lambda n: (cost(n), -n))
    places: dict[int, Place] = {}
    windows: list[int | None] = []
    for spec, layers in classes.items():
        capacity = num_slabs * parts[spec]
        for start in range(0, len(layers), capacity):
            for i, layer in enumerate(layers[start : start + capacity]):
                places[layer] = Place(len(windows), i % num_slabs, i // num_slabs)
            windows.append(spec.window)
    return PoolLayout(dict(specs), places, tuple(windows), num_slabs, key_numel, value_numel)


def _parts(spec: LayerSpec, key_numel: int, value_numel: int) -> int:
    """How many layers of this shape fit into one entry."""
    ratios = [
        whole // part for whole, part in ((key_numel, spec.key_numel), (value_numel, spec.value_numel)) if part > 0
    ]
    return min(ratios, default=1)
