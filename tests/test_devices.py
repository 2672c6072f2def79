"""Layers on several devices: where their slabs are, what a step makes on each device, and how much memory that is."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import accelerate
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import DynamicCache, masking_utils

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, PagedCache, sizes
from paged_cache.compat import execution_device
from paged_cache.devices import input_device, is_spread, layer_devices
from paged_cache.errors import InvalidRequestError
from paged_cache.masks import LazyMask, MaskPattern, MaskSource
from paged_cache.memory.layout import LayerSpec, plan_layout
from paged_cache.memory.storage import KVStorage, Lane
from paged_cache.state import PagedState
from paged_cache.step import StepInputs
from tests.memory.test_layout import HEAD, SLIDING, assert_sound, layers, models
from tests.models import assert_whole, model, poisoned_pool, prompts
from tests.preloaded import run_script

CPU, META = torch.device("cpu"), torch.device("meta")
RUNS = [
    "padded: llama", "padded: gemma2", "padded: gpt2", "without patch", "without numbers", "beams", "packed: llama",
    "packed: begins elsewhere", "packed: gemma2", "states: lfm2", "8 bits", "memory", "prefix file", "moved",
]  # fmt: skip
"""Those of `far_runs.py`, which registers its devices in the process that imports it."""
SECONDS = 240  # a process that imports torch and transformers on a busy machine


@given(models, st.data())
def test_layers_of_different_devices_share_no_slab(specs: list[LayerSpec], data: st.DataObject) -> None:
    """Whatever the layers and the devices: a sound layout in which each layer's slab is on the layer's device."""
    devices = {i: data.draw(st.sampled_from("abc")) for i in range(len(specs))}
    layout = plan_layout(layers(*specs), devices)

    assert_sound(layout)
    assert {i: layout.device_of(i) for i in layout.places} == devices
    if specs:
        corrected = layout.with_spec(0, LayerSpec(specs[0].window, 3, 5, 3, 5))
        assert_sound(corrected)
        assert {i: corrected.device_of(i) for i in corrected.places} == devices
        assert {i: p.group for i, p in corrected.places.items()} == {i: p.group for i, p in layout.places.items()}


@given(models)
def test_one_device_is_laid_out_as_none(specs: list[LayerSpec]) -> None:
    """Naming the one device that there is changes no place and no size."""
    named, plain = plan_layout(layers(*specs), dict.fromkeys(range(len(specs)), CPU)), plan_layout(layers(*specs))

    assert (named.places, named.windows, named.num_slabs) == (plain.places, plain.windows, plain.num_slabs)


def test_a_plain_model_on_two_devices_wastes_nothing() -> None:
    """32 layers of one kind, 20 here and 12 there: one group, a slab per layer."""
    layout = plan_layout(layers(*[HEAD] * 32), {i: "a" if i < 20 else "b" for i in range(32)})

    assert layout.windows == (None,)
    assert [layout.slab_devices.count(device) for device in "ab"] == [20, 12]


def test_gemma_3_on_two_devices() -> None:
    """52 sliding and 10 full layers, half of them on each device: as many groups as on one device, an eighth unused."""
    specs = layers(*(HEAD if i % 6 == 5 else SLIDING for i in range(62)))
    layout = plan_layout(specs, {i: "a" if i < 31 else "b" for i in specs})

    assert_sound(layout)
    assert 1 - layout.numel_per_token / (layout.entry_numel_per_token * len(layout.windows)) < 0.125


def test_memory_is_that_of_all_devices_or_of_the_scarcest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are divided by what a block takes everywhere; a share is taken of each device, and the smallest count holds."""
    nbytes = {CPU: 300, META: 100}
    free = {CPU: 30_000, META: 5_000}
    monkeypatch.setattr(sizes, "free_memory", free.__getitem__)

    assert sizes.num_blocks_for(None, 4_000, nbytes) == 10
    assert sizes.num_blocks_for(None, "4k", nbytes) == 10
    assert sizes.num_blocks_for(None, 0.5, nbytes) == min(15_000 // 300, 2_500 // 100)
    assert sizes.num_blocks_for(7, None, nbytes) == 7
    with pytest.raises(InvalidRequestError, match=r"memory=0.01 is 50 bytes of meta; one block alone takes 100"):
        sizes.num_blocks_for(None, 0.01, nbytes)
    with pytest.raises(InvalidRequestError, match=r"memory=399 is 399 bytes; one block alone takes 400"):
        sizes.num_blocks_for(None, 399, nbytes)


def test_bytes_by_device() -> None:
    """What a token takes on each device adds up to what it takes, scales included."""
    layout = plan_layout(layers(*[HEAD] * 5), {0: "a", 1: "a", 2: "a", 3: "b", 4: "b"})
    by_device = layout.entry_bytes_by_device(1, 4)

    assert sum(by_device.values()) == layout.entry_bytes_per_token(1, 4)
    assert by_device["a"] * 2 == by_device["b"] * 3


def two_devices(kv_dtype: torch.dtype | None = None) -> KVStorage:
    """Sliding and full layers in turns, the first two on the CPU, the others nowhere."""
    specs = layers(SLIDING, HEAD, SLIDING, HEAD)
    layout = plan_layout(specs, {i: CPU if i < 2 else META for i in specs})
    return KVStorage(layout, 6, 4, torch.float32, CPU, kv_dtype)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_slabs_are_where_their_layers_are(kv_dtype: torch.dtype | None) -> None:
    """Views, scales and bytes of each layer are on its device; what is done to all blocks is done on both."""
    storage = two_devices(kv_dtype)

    assert storage.devices == (CPU, META)
    for layer, blocks in storage.layers.items():
        device = CPU if layer < 2 else META
        assert storage.device_of(layer) == blocks.keys.device == blocks.values.device == device
        assert blocks.keys.shape == (6, 4, 2, 16)
        assert (blocks.key_scales is None) == (kv_dtype is None)
        assert kv_dtype is None or blocks.key_scales.device == blocks.value_scales.device == device
    on_cpu = sum(slab.nbytes for slab in storage._slabs if slab.device == CPU)
    assert storage.nbytes == 2 * on_cpu
    storage.fill_blocks([1], 3.0)
    assert all((x == 3).all() for x in storage.gather(0, torch.arange(4, 8)))
    storage.slabs.pop(META)  # nothing can be copied there
    storage.copy_blocks([(1, 2)])
    assert all((x == 3).all() for x in storage.gather(1, torch.arange(8, 12)))


def test_a_lane_for_each_group_on_each_device() -> None:
    """Layers of one group on one device share a lane; a corrected layer stays in it."""
    storage = two_devices()
    sliding, full = (storage.layout.places[i].group for i in (0, 1))

    assert set(storage.lanes) == {Lane(group, device) for group in (sliding, full) for device in (CPU, META)}
    lanes = [storage.lanes[storage.lane_of[i]] for i in range(4)]
    assert lanes == [Lane(sliding, CPU), Lane(full, CPU), Lane(sliding, META), Lane(full, META)]
    storage.relayout(storage.layout.with_spec(2, LayerSpec(SLIDING.window, 1, 8, 1, 8)))
    assert [storage.lanes[storage.lane_of[i]] for i in range(4)] == lanes
    assert storage.layers[2].keys.device == META


def test_a_step_makes_tensors_on_each_device() -> None:
    """Slots, tables and lengths are on the device of the layers that read them, and the same for all groups there."""
    of = hooked(model("gemma2"), lambda i: META if i % 4 > 1 else CPU)
    pool = BlockPool.for_model(of, num_blocks=40, block_size=4)
    state = PagedState(pool)
    step = state.begin(StepInputs(batch=2, q_len=3, pads=[0, 2], lazy=True))

    assert {group.device for group in step.groups} == {CPU, META}
    for group in step.groups:
        tensors = [group.slots, group.written, group.block_table, group.lengths.seq_lens, group.lengths.pads]
        assert {x.device for x in tensors} == {group.device}
        assert group.block_table.shape[0] == 2
        assert group.lengths is step.lengths(group.device)
    by_group = {g.group: g.block_table for g in step.groups if g.device == CPU}
    assert all(table[:, 0].min() >= 0 for table in by_group.values())
    state.abort()
    state.clear()
    assert_whole(pool)


def hooked(of: torch.nn.Module, device_of) -> torch.nn.Module:
    """A copy of a model in whose decoder layers accelerate's hooks say these devices."""
    of = copy.deepcopy(of)
    for i, layer in enumerate(of.model.layers):
        layer.self_attn._hf_hook = SimpleNamespace(execution_device=device_of(i))
    return of


def test_where_layers_compute() -> None:
    """Hooks inside a layer come first, then those around it, then its weights; inputs begin at the embedding."""
    of = hooked(model("llama"), {0: "meta", 1: None}.get)
    assert layer_devices(of, [0, 1]) == {0: META, 1: CPU}
    assert input_device(of) == CPU
    assert is_spread(of) is False
    of._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device="meta")])
    assert layer_devices(of, [0, 1]) == {0: META, 1: META}
    assert input_device(of) == META
    of.model.layers[1].mlp.down_proj._hf_hook = SimpleNamespace(execution_device="cpu")
    assert layer_devices(of, [0, 1]) == {0: META, 1: META}
    of.model.layers[1].self_attn.v_proj._hf_hook = SimpleNamespace(execution_device="cpu")
    assert layer_devices(of, [0, 1, 2]) == {0: META, 1: CPU, 2: META}
    assert is_spread(of)
    assert execution_device(of.model.layers[1].self_attn.v_proj) == CPU
    assert execution_device(of.model.layers[1]) is None


def test_a_mask_moves_without_being_made() -> None:
    """accelerate moves masks from layer to layer: the pattern stays known, and what is made is made once, there."""
    made = []

    def make(**kwargs):
        made.append(kwargs)
        return masking_utils.sdpa_mask(**kwargs)

    kwargs = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2, "allow_is_causal_skip": False}
    source = MaskSource(MaskPattern(), make, kwargs | {"mask_function": masking_utils.causal_mask_function})
    mask = LazyMask(source, (2, 1, 3, 5), torch.bool, CPU)
    moved = accelerate.utils.send_to_device({"attention_mask": mask}, META)["attention_mask"]

    assert isinstance(moved, LazyMask)
    assert moved.source is source
    assert moved.device == META
    assert mask.to("cpu") is mask
    assert not made
    assert moved.exact().device == META
    assert (moved | True).device == META
    assert type(mask.float()) is torch.Tensor
    assert len(made) == 3


@pytest.fixture(scope="module")
def far_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What `far_runs.py` says of each run: the traceback of one that failed."""
    script = Path(__file__).with_name("far_runs.py")
    status, output, errors = run_script(script, tmp_path_factory.mktemp("far_runs"), timeout=SECONDS)
    assert status == 0, errors
    found: dict[str, str | None] = json.loads(output.splitlines()[-1])
    assert list(found) == RUNS
    return found


@pytest.mark.parametrize("name", RUNS)
def test_whole_models_on_three_devices(name: str, far_runs: dict[str, str | None]) -> None:
    """Models that accelerate dispatches over the CPU and two devices that are as strict as GPUs give their plain tokens."""
    assert far_runs[name] is None, far_runs[name]


@pytest.mark.gpu
@pytest.mark.parametrize("main", [0, "cpu"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_gpu_and_cpu(kind: str, main: int | str) -> None:
    """Layers on a GPU and on the CPU, or offloaded to the CPU and computed on the GPU: plain tokens, in `generate` and batches."""
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    of, inputs = copy.deepcopy(model(kind)), prompts()
    expected = of.generate(**inputs, **options, past_key_values=DynamicCache(config=of.config))[:, 33:].tolist()
    places = {f"model.layers.{i}": ("cpu", 0)[i % 2] for i in range(len(of.model.layers))}
    others = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], main)
    of = accelerate.dispatch_model(of, places | others, main_device=main)
    pool = poisoned_pool(of)
    inputs = {name: x.to(input_device(of)) for name, x in inputs.items()}

    assert {device.type for device in pool.devices} == ({"cuda"} if main == 0 else {"cuda", "cpu"})
    with paged_cache.patch(of):
        for _ in range(2):
            output = of.generate(**inputs, **options, past_key_values=PagedCache(pool))
            assert output[:, 33:].tolist() == expected
    assert pool.stats().prefix_hits > 0
    rows = [x[mask.bool()].tolist() for x, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    with ContinuousBatcher(of, pool) as batcher:
        assert [output.generated_tokens for output in batcher.generate(rows, **options)] == expected
