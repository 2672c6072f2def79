"""What is written at a slot is read there, in every layer, and blocks are copied whole.

All of it in either order of a block's dimensions, stored as it is or in 8 bits.
"""

import pytest
import torch

from paged_cache.kernels.quantized import LARGEST, dequantize, quantize
from paged_cache.memory import storage as storage_module
from paged_cache.memory.layout import LayerSpec, PoolLayout, plan_layout
from paged_cache.memory.storage import KVStorage, itemsizes

NUM_BLOCKS, BLOCK_SIZE = 6, 4
NUM_SLOTS = NUM_BLOCKS * BLOCK_SIZE
PLAIN = LayerSpec(window=None, key_heads=2, key_dim=8, value_heads=2, value_dim=8)
SMALL = LayerSpec(window=6, key_heads=1, key_dim=8, value_heads=1, value_dim=4)
LATENT = LayerSpec(window=None, key_heads=1, key_dim=16, value_heads=1, value_dim=0)
WIDE = LayerSpec(window=None, key_heads=3, key_dim=5, value_heads=1, value_dim=7)
MODELS = {
    "plain": [PLAIN] * 3,
    "two windows": [PLAIN, LayerSpec(6, 2, 8, 2, 8)] * 2,
    "two to an entry": [SMALL] * 4 + [PLAIN] * 2,
    "latents": [LATENT] * 2,
    "mixed": [PLAIN, SMALL, LATENT, WIDE, SMALL],
}
STORED = [
    pytest.param(("NHD", torch.float32), id="NHD"),
    pytest.param(("HND", torch.float32), id="HND"),
    pytest.param(("NHD", torch.int8), id="NHD int8"),
    pytest.param(("HND", torch.float8_e4m3fn), id="HND e4m3"),
]
OPTIONS = {"kv_dtype": None}  # of all storages; the fixture sets them
every_model = pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True, params=STORED)
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the storages of a test hold K and V."""
    order, kv_dtype = request.param
    monkeypatch.setitem(storage_module.ORDERS, "cpu", order)
    monkeypatch.setitem(OPTIONS, "kv_dtype", kv_dtype)


def layout_of(specs: list[LayerSpec]) -> PoolLayout:
    """The layout of a model with these layers."""
    return plan_layout(dict(enumerate(specs)))


def storage_of(specs: list[LayerSpec]) -> KVStorage:
    """NaN in every slot, so that what nobody wrote shows."""
    storage = KVStorage(layout_of(specs), NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"), **OPTIONS)
    storage.fill_blocks(list(range(NUM_BLOCKS)), float("nan"))
    return storage


def content(spec: LayerSpec, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that say where they belong: layer, slot and element."""
    tags = 10_000.0 * layer + 100.0 * slots[:, None, None]
    keys = torch.arange(float(spec.key_numel)).view(spec.key_heads, spec.key_dim)
    values = torch.arange(float(spec.value_numel)).view(spec.value_heads, spec.value_dim)
    return tags + keys, -tags - values


def groups_of(storage: KVStorage) -> dict[int, list[int]]:
    """Layers of each group: those that use a block at the same time."""
    places = storage.layout.places
    return {g: [i for i, place in places.items() if place.group == g] for g in range(len(storage.layout.windows))}


def write_all(storage: KVStorage, group: int) -> None:
    """Fills all slots of a group's layers, in no order."""
    for layer in groups_of(storage)[group]:
        slots = torch.randperm(NUM_SLOTS)
        storage.write(layer, slots, *content(storage.layout.specs[layer], layer, slots))


def assert_holds(storage: KVStorage, layer: int, slots: torch.Tensor, origins: torch.Tensor) -> None:
    """The layer's `slots` hold what was written to `origins`."""
    keys, values = storage.gather(layer, slots)
    expected_keys, expected_values = content(storage.layout.specs[layer], layer, origins)
    assert torch.equal(keys, as_stored(storage, expected_keys))
    assert torch.equal(values, as_stored(storage, expected_values))


def as_stored(storage: KVStorage, x: torch.Tensor) -> torch.Tensor:
    """What comes back of keys or values."""
    return dequantize(*quantize(x, storage.kv_dtype)) if storage.kv_dtype in LARGEST else x


@every_model
def test_what_is_written_is_read(specs: list[LayerSpec]) -> None:
    """Every layer reads its own keys and values at every slot after all layers of its group wrote theirs."""
    storage = storage_of(specs)
    slots = torch.randperm(NUM_SLOTS)
    for group, members in groups_of(storage).items():
        write_all(storage, group)
        for layer in members:
            assert_holds(storage, layer, slots, slots)


@every_model
def test_other_slots_are_left_alone(specs: list[LayerSpec]) -> None:
    """A write touches its own slots in its own layer."""
    storage = storage_of(specs)
    slots = torch.tensor([1, 7, 23])
    others = torch.tensor([i for i in range(NUM_SLOTS) if i not in slots])

    storage.write(0, slots, *content(specs[0], 0, slots))

    assert_holds(storage, 0, slots, slots)
    assert all(x.isnan().all() for x in storage.gather(0, others))
    for layer in set(groups_of(storage)[storage.layout.places[0].group]) - {0}:
        assert all(x.isnan().all() for x in storage.gather(layer, slots))


@every_model
def test_views_show_the_same(specs: list[LayerSpec]) -> None:
    """Kernels read by block and offset what `gather` reads by slot."""
    storage = storage_of(specs)
    write_all(storage, 0)
    for layer in groups_of(storage)[0]:
        keys, values = storage.gather(layer, torch.arange(NUM_SLOTS))
        blocks = storage.layers[layer]
        assert blocks.keys.shape[:2] == blocks.values.shape[:2] == (NUM_BLOCKS, BLOCK_SIZE)
        for cache, scales, found in (
            (blocks.keys, blocks.key_scales, keys),
            (blocks.values, blocks.value_scales, values),
        ):
            read = cache if scales is None else dequantize(cache, scales)
            assert torch.equal(read.flatten(0, 1), found)
            assert cache.dtype is storage.kv_dtype


@every_model
def test_blocks_are_copied_in_all_layers(specs: list[LayerSpec]) -> None:
    """A copy holds what its source holds, in every layer of the group, and the source stays."""
    storage = storage_of(specs)
    write_all(storage, 0)

    storage.copy_blocks([(0, 3), (0, 5), (4, 1)])
    storage.copy_blocks([])

    origin = torch.tensor([0, 4, 2, 0, 4, 0])
    slots = torch.arange(NUM_SLOTS)
    for layer in groups_of(storage)[0]:
        assert_holds(storage, layer, slots, origin[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE)


def test_filled_blocks_hold_nothing_else() -> None:
    """Poison covers whole blocks and no other block."""
    storage = storage_of(MODELS["two to an entry"])
    write_all(storage, 0)

    storage.fill_blocks([2], float("nan"))

    keys, values = storage.gather(0, torch.arange(8, 12))
    assert keys.isnan().all()
    assert values.isnan().all()
    rest = torch.tensor([i for i in range(NUM_SLOTS) if i // BLOCK_SIZE != 2])
    assert_holds(storage, 0, rest, rest)


@pytest.mark.parametrize("name", ["plain", "two to an entry", "mixed"])
def test_another_layout_keeps_the_content(name: str) -> None:
    """When one layer turns out to have other shapes, what the others hold moves along."""
    specs = MODELS[name]
    storage = storage_of(specs)
    write_all(storage, 0)
    members = groups_of(storage)[0]

    storage.relayout(storage.layout.with_spec(members[0], LayerSpec(specs[members[0]].window, 4, 8, 4, 8)))

    slots = torch.arange(NUM_SLOTS)
    for layer in members[1:]:
        assert_holds(storage, layer, slots, slots)
    write_all(storage, 0)
    for layer in members:
        assert_holds(storage, layer, slots, slots)


def test_a_layout_that_does_not_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory while moving to another layout: the storage is as before."""
    storage = storage_of(MODELS["plain"])
    write_all(storage, 0)
    before = storage.layout

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(MemoryError):
        storage.relayout(before.with_spec(0, WIDE))
    monkeypatch.undo()

    assert storage.layout is before
    slots = torch.arange(NUM_SLOTS)
    for layer in range(3):
        assert_holds(storage, layer, slots, slots)
    itemsize, scale_itemsize = itemsizes(storage.kv_dtype)
    assert storage.nbytes == NUM_SLOTS * 3 * (32 * itemsize + 4 * scale_itemsize)


@every_model
def test_bytes_are_counted(specs: list[LayerSpec]) -> None:
    """The layout says beforehand what the tensors take."""
    storage = storage_of(specs)

    itemsize, scale_itemsize = itemsizes(storage.kv_dtype)
    layout, scales = storage.layout, [x for x in storage._slabs if x.dtype is not storage.kv_dtype]
    assert storage.nbytes == layout.entry_bytes_per_token(itemsize, scale_itemsize) * NUM_SLOTS
    assert storage.nbytes == layout.entry_numel_per_token * NUM_SLOTS * itemsize + sum(x.nbytes for x in scales)
    assert layout.bytes_per_token(itemsize, scale_itemsize) <= storage.nbytes // NUM_SLOTS * len(layout.windows)
    assert len(scales) == (2 * layout.num_slabs if scale_itemsize else 0)


def test_a_run_of_one_head_is_contiguous_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order follows the device: tokens beside each other on the CPU, heads elsewhere; scales always by head."""
    monkeypatch.undo()
    monkeypatch.setitem(storage_module.ORDERS, "meta", storage_module.ORDERS["cuda"])
    storages = [
        KVStorage(layout_of([PLAIN]), NUM_BLOCKS, BLOCK_SIZE, torch.float16, torch.device(device), torch.int8)
        for device in ("cpu", "meta")
    ]
    assert [storage.layers[0].keys.stride()[1:3] for storage in storages] == [(16, 8), (8, 32)]
    assert [storage.layers[0].value_scales.stride()[1:] for storage in storages] == [(1, BLOCK_SIZE)] * 2
