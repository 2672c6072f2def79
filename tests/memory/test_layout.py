"""Every layer has a place of its own, and little memory is left unused."""

from collections import defaultdict
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from paged_cache.memory.layout import LayerSpec, PoolLayout, plan_layout

HEAD = LayerSpec(window=None, key_heads=2, key_dim=16, value_heads=2, value_dim=16)
SLIDING = replace(HEAD, window=1024)

shapes = st.builds(
    LayerSpec,
    window=st.sampled_from((None, 6, 1024)),
    key_heads=st.sampled_from((1, 2, 8)),
    key_dim=st.sampled_from((0, 16, 64)),
    value_heads=st.sampled_from((1, 2)),
    value_dim=st.sampled_from((0, 16, 128)),
)
models = st.lists(shapes, min_size=1, max_size=4).flatmap(lambda kinds: st.lists(st.sampled_from(kinds), max_size=70))


def layers(*specs: LayerSpec) -> dict[int, LayerSpec]:
    """Layers in the order of a model."""
    return dict(enumerate(specs))


def assert_sound(layout: PoolLayout) -> None:
    """No two layers of a group overlap, each fits into its entry, and layers of a group share a window."""
    taken: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    assert layout.places.keys() == layout.specs.keys()
    for layer, place in layout.places.items():
        spec = layout.specs[layer]
        assert layout.windows[place.group] == spec.window
        assert 0 <= place.slab < layout.num_slabs
        keys = place.part * spec.key_numel, (place.part + 1) * spec.key_numel
        values = place.part * spec.value_numel, (place.part + 1) * spec.value_numel
        assert keys[1] <= layout.key_numel
        assert values[1] <= layout.value_numel
        for other in taken[place.group, place.slab]:
            assert spec.key_numel == 0 or keys[1] <= other[0] or other[1] <= keys[0]
            assert spec.value_numel == 0 or values[1] <= other[2] or other[3] <= values[0]
        taken[place.group, place.slab].append((*keys, *values))
    assert {place.group for place in layout.places.values()} == set(range(len(layout.windows)))


def share_unused(layout: PoolLayout) -> float:
    """How much of the blocks that a token takes in all groups holds nothing."""
    return 1 - layout.numel_per_token / (layout.entry_numel_per_token * len(layout.windows))


@given(models)
def test_any_model_is_laid_out(specs: list[LayerSpec]) -> None:
    """Whatever the layers: each has a place, inside its entry, that no other layer of its group has."""
    assert_sound(plan_layout(layers(*specs)))


@given(st.lists(st.sampled_from((None, 512, 1024)), min_size=1, max_size=80))
def test_little_is_unused_with_one_shape(windows: list[int | None]) -> None:
    """Layers that differ in their windows only leave at most a quarter unused, in a handful of groups."""
    layout = plan_layout(layers(*(replace(HEAD, window=window) for window in windows)))

    assert share_unused(layout) <= 0.25
    assert len(layout.windows) <= 16


@given(models, st.data())
def test_a_corrected_layer_keeps_the_groups(specs: list[LayerSpec], data: st.DataObject) -> None:
    """When a layer turns out to have other shapes, all layers stay in their groups: block tables go on."""
    before = plan_layout(layers(*specs))
    if not specs:
        return
    layer = data.draw(st.sampled_from(sorted(before.specs)))
    spec = replace(data.draw(shapes), window=before.specs[layer].window)

    after = before.with_spec(layer, spec)

    assert_sound(after)
    assert after.windows == before.windows
    assert after.specs[layer] == spec
    assert {i: place.group for i, place in after.places.items()} == {i: p.group for i, p in before.places.items()}


def test_one_kind_of_layer_is_one_group() -> None:
    """A plain model has one table per sequence and a slab per layer, without any rest."""
    layout = plan_layout(layers(*[HEAD] * 32))

    assert layout.windows == (None,)
    assert layout.num_slabs == 32
    assert share_unused(layout) == 0


def test_gemma_3() -> None:
    """52 sliding and 10 full layers: groups of 13, in which 3 of 65 places are empty."""
    layout = plan_layout(layers(*(HEAD if i % 6 == 5 else SLIDING for i in range(62))))

    assert_sound(layout)
    assert sorted(layout.windows, key=str) == [1024] * 4 + [None]
    assert layout.num_slabs == 13
    assert share_unused(layout) < 0.05


def test_gpt_oss() -> None:
    """18 sliding and 18 full layers: two groups without any rest."""
    layout = plan_layout(layers(*(SLIDING if i % 2 == 0 else HEAD for i in range(36))))

    assert set(layout.windows) == {None, 1024}
    assert layout.num_slabs == 18
    assert share_unused(layout) == 0


def test_small_layers_share_an_entry() -> None:
    """Sliding layers of half the size (as in Gemma-3n's kin) lie two to an entry, and nothing is unused."""
    small = replace(SLIDING, key_heads=1, value_heads=1)
    layout = plan_layout(layers(*[small] * 20, *[HEAD] * 10))

    assert_sound(layout)
    assert share_unused(layout) == 0
    assert {place.part for layer, place in layout.places.items() if layer < 20} == {0, 1}


def test_latents_may_be_keys_without_values() -> None:
    """A layer whose values have no elements has a place like any other."""
    layout = plan_layout(layers(*[replace(HEAD, key_dim=512, value_dim=0)] * 4))

    assert_sound(layout)
    assert (layout.key_numel, layout.value_numel) == (1024, 0)


def test_a_model_without_keys_and_values() -> None:
    """Models that keep states only need no slab and no group."""
    layout = plan_layout({})

    assert (layout.windows, layout.num_slabs, layout.entry_numel_per_token) == ((), 0, 0)


def test_layers_without_keys_and_values_are_left_out() -> None:
    """Hybrids number their layers with gaps; only those with K and V have a place."""
    layout = plan_layout({3: HEAD, 7: HEAD})

    assert layout.places.keys() == {3, 7}
    assert layout.num_slabs == 2
