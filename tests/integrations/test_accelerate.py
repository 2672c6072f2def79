"""Models that accelerate dispatches and offloads: the tokens of the plain model, on paged memory, with prefixes reused."""

import copy
import functools
from unittest import mock

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_module
from transformers import AutoModelForCausalLM, DynamicCache

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, PagedCache
from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import dispatch
from tests import models
from tests.models import TokenCounter, assert_whole, poisoned_pool, prompts

GREEDY = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
WAYS = ["hooks only", "cpu", "disk", "cpu and disk by layer", "every other layer"]
OFFLOADED = WAYS[1:]


@functools.cache
def model(kind):
    """The tiny model; of gemma2 a copy, since transformers 5.17 leaves softcap out by default."""
    of = models.model(kind)
    if kind == "gemma2":
        of = copy.deepcopy(of)
        of.set_attn_implementation("eager")
    return of


def offloaded(of, way, folder):
    """A copy of a model under hooks of accelerate; in all ways but the first some weights are elsewhere between calls."""
    of = copy.deepcopy(of)
    layers = {name: i for i, name in enumerate(layer_names(of))}
    parts = [name for name, module in leaves(of) if not any(name.startswith(f"{layer}.") for layer in layers)]
    if way == "hooks only":
        return accelerate.dispatch_model(of, {"": "cpu"}, force_hooks=True)
    if way == "cpu":
        return accelerate.cpu_offload(of)
    if way == "disk":
        return accelerate.disk_offload(of, folder)
    if way == "cpu and disk by layer":
        places = dict.fromkeys(parts, "disk") | {name: "disk" if i % 2 else "cpu" for name, i in layers.items()}
        return accelerate.dispatch_model(of, places, offload_dir=folder)
    state = {name: tensor.clone() for name, tensor in of.state_dict().items()}
    places = dict.fromkeys(parts, False) | {name: bool(i % 2) for name, i in layers.items()}
    attach_align_device_hook_on_blocks(of, dict.fromkeys(["", *places], "cpu"), places, weights_map=state)
    return of


def layer_names(of):
    """Names of the modules that are decoder layers."""
    lists = [(name, module) for name, module in of.named_modules() if isinstance(module, torch.nn.ModuleList)]
    name, module = max(lists, key=lambda pair: sum(x.numel() for x in pair[1].parameters()))
    return [f"{name}.{i}" for i in range(len(module))]


def leaves(of):
    """The modules that have weights or buffers of their own."""
    for name, module in of.named_modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            yield name, module


@functools.cache
def expected(kind, lengths=(5, 12, 33), **options):
    """What the plain model generates for each prompt alone, with transformers' own cache."""
    of, inputs = model(kind), prompts(lengths)
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        alone = ids[mask.bool()][None]
        cache = DynamicCache(config=of.config.get_text_config())
        output = of.generate(alone, attention_mask=torch.ones_like(alone), **GREEDY | options, past_key_values=cache)
        rows.append(output[0, alone.shape[1] :].tolist())
    return rows


def generate(of, pool, lengths=(5, 12, 33), **options):
    """New tokens of a padded batch on paged memory."""
    inputs = prompts(lengths)
    output = of.generate(**inputs, **GREEDY | options, past_key_values=PagedCache(pool))
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def unpadded(lengths=(5, 12, 33)):
    """The same prompts as lists."""
    inputs = prompts(lengths)
    return [x[mask.bool()].tolist() for x, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@pytest.fixture
def kernel_calls():
    """Counts calls of a kernel on blocks."""
    with mock.patch.object(paged_cache.attention, "paged_attention", wraps=dispatch.paged_attention) as kernel:
        yield kernel


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_generate(kind, way, tmp_path, kernel_calls):
    """A padded batch gets the plain model's tokens, every decoding step of every layer through a kernel."""
    of = offloaded(model(kind), way, tmp_path)
    pool = poisoned_pool(of)

    with paged_cache.patch(of):
        assert generate(of, pool) == expected(kind)

    assert any(x.is_meta for x in of.parameters()) == (way in OFFLOADED)
    assert kernel_calls.call_count == (GREEDY["max_new_tokens"] - 1) * len(pool.spec.layers)
    assert pool.devices == (torch.device("cpu"),)
    assert_whole(pool)


@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v3"])
def test_other_attention(kind, tmp_path):
    """Models with states, and those that expand latents behind the cache, get the same tokens as well."""
    of = offloaded(model(kind), "cpu and disk by layer", tmp_path)
    pool = poisoned_pool(of)

    with paged_cache.patch(of):
        assert generate(of, pool, (9, 9)) == expected(kind, (9, 9))


def test_without_patch(tmp_path):
    """A model that is not patched gathers dense K and V, with the same tokens."""
    of = offloaded(model("llama"), "disk", tmp_path)

    assert generate(of, poisoned_pool(of)) == expected("llama")


@pytest.mark.parametrize("way", WAYS)
def test_prefixes_are_reused(way, tmp_path):
    """Weights that come and go with each forward are the same weights: a second call computes only what is new."""
    of = offloaded(model("llama"), way, tmp_path)
    pool = poisoned_pool(of)

    with paged_cache.patch(of):
        generate(of, pool, (33,))
        with TokenCounter(of) as counter:
            assert generate(of, pool, (33,)) == expected("llama", (33,))

    assert counter.tokens == 33 - 32 + GREEDY["max_new_tokens"] - 1
    assert pool.stats().prefix_hits == 32


@pytest.mark.parametrize("way", OFFLOADED)
def test_other_weights_are_other_prefixes(way, tmp_path):
    """After another model's weights were put under the hooks, nothing of the first ones is reused."""
    of = offloaded(model("llama"), way, tmp_path)
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        generate(of, pool, (33,))
        remove_hook_from_module(of, recurse=True)
        with torch.no_grad():
            of.model.layers[0].self_attn.k_proj.weight.mul_(-1)
        accelerate.cpu_offload(of)
        with TokenCounter(of) as counter:
            generate(of, pool, (33,))

    assert counter.tokens == 33 + GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize("way", OFFLOADED)
def test_beams(way, tmp_path):
    """Beam search gets the plain model's beams."""
    of = offloaded(model("llama"), way, tmp_path)
    pool = poisoned_pool(of)

    with paged_cache.patch(of):
        assert generate(of, pool, (12,), num_beams=3) == expected("llama", (12,), num_beams=3)
    assert_whole(pool)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "name"), [("llama", "packed"), ("gemma2", "packed"), ("qwen3_next", "padded")])
def test_batcher(kind, name, way, tmp_path):
    """The batcher takes the same way of execution as for the plain model, and gives each prompt its tokens."""
    of = offloaded(model(kind), way, tmp_path)
    pool = poisoned_pool(of)

    with ContinuousBatcher(of, pool) as batcher:
        outputs = batcher.generate(unpadded(), **GREEDY)
        assert batcher._engine.forward.name == name

    assert [output.generated_tokens for output in outputs] == expected(kind)


def test_batcher_with_processors_and_beams(tmp_path):
    """Processors, sampling and beams find their inputs where the model computes, not where its weights are."""
    of = offloaded(model("llama"), "disk", tmp_path)
    assert of.device.type == "meta"
    options = [{"repetition_penalty": 1.5}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}]

    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        handles = [batcher.submit(unpadded((12,))[0], **GREEDY | each) for each in options]
        found = [handle.result(timeout=60).generated_tokens for handle in handles]

    assert found == [expected("llama", (12,), **each)[0] for each in options]


def test_tied_weights(tmp_path):
    """An embedding that is also the head is offloaded once, and gives the same tokens."""
    of = copy.deepcopy(model("llama"))
    of.config.tie_word_embeddings = True
    of.lm_head.weight = of.model.embed_tokens.weight
    inputs = prompts((7,))
    tokens = of.generate(**inputs, **GREEDY, past_key_values=DynamicCache())
    of = offloaded(of, "cpu and disk by layer", tmp_path)
    pool = poisoned_pool(of)

    with paged_cache.patch(of):
        for _ in range(2):
            assert torch.equal(of.generate(**inputs, **GREEDY, past_key_values=PagedCache(pool)), tokens)


def test_from_pretrained_with_a_device_map(tmp_path):
    """A checkpoint loaded with layers on disk works as any model does."""
    of = from_disk(tmp_path)
    pool = poisoned_pool(of)

    with paged_cache.patch(of):
        assert generate(of, pool) == expected("llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a LoRA adapter, and the tokens of the plain model with it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(model("llama")), config).eval()
    tuned.save_pretrained(folder)
    inputs = prompts((33,))
    tokens = tuned.generate(**inputs, **GREEDY, past_key_values=DynamicCache())[0, 33:].tolist()
    assert [tokens] != expected("llama", (33,))
    return folder, tokens


def from_disk(folder):
    """The model of a checkpoint whose second layer stays on disk."""
    model("llama").save_pretrained(folder / "model")
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    others = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    of = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=layers | others, offload_folder=folder / "weights"
    )
    assert any(x.is_meta for x in of.parameters())
    return of.eval()


@pytest.mark.parametrize("order", ["adapter first", "layers first", "loaded first"])
def test_adapters(order, adapter, tmp_path, monkeypatch):
    """A LoRA adapter on an offloaded model is offloaded with it, and computes its own tokens and prefixes."""
    monkeypatch.chdir(tmp_path)  # peft makes folders here, named like those of the weights
    folder, tokens = adapter
    if order == "adapter first":
        tuned = accelerate.cpu_offload(peft.PeftModel.from_pretrained(copy.deepcopy(model("llama")), folder).eval())
    elif order == "layers first":
        of = offloaded(model("llama"), "cpu and disk by layer", tmp_path)
        tuned = peft.PeftModel.from_pretrained(of, folder, offload_dir=str(tmp_path / "tuned")).eval()
    else:
        of = from_disk(tmp_path)
        places = {f"base_model.model.{part}": place for part, place in of.hf_device_map.items()}
        more = {"device_map": places, "offload_dir": str(tmp_path / "tuned")}
        tuned = peft.PeftModel.from_pretrained(of, folder, **more).eval()
    assert any(x.is_meta for x in tuned.parameters()) == (order != "layers first")  # peft brings them back into memory
    pool = poisoned_pool(tuned)

    with paged_cache.patch(tuned):
        for _ in range(2):
            assert generate(tuned, pool, (33,)) == [tokens]
        with ContinuousBatcher(tuned, pool) as batcher:
            (output,) = batcher.generate(unpadded((33,)), **GREEDY)
    assert output.generated_tokens == tokens


@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize("gone_first", ["patch", "hooks"])
def test_patch_and_hooks_in_any_order(first, gone_first):
    """Whichever comes first and whichever goes first: both work while they are there, and what stays works without the other."""
    of = copy.deepcopy(model("llama"))
    pool, before = poisoned_pool(of), set(vars(of))
    steps = {"patch": lambda: paged_cache.patch(of), "hooks": lambda: accelerate.cpu_offload(of)}
    undo = {"patch": lambda: paged_cache.unpatch(of), "hooks": lambda: remove_hook_from_module(of, recurse=True)}
    second, stays = ({"patch", "hooks"} - {name} for name in (first, gone_first))

    steps[first]()
    for name in second:
        steps[name]()
    assert generate(of, pool) == expected("llama")
    undo[gone_first]()
    assert generate(of, pool) == expected("llama")
    assert ({"patch"} == stays) == paged_cache.is_patched(of)
    assert hasattr(of, "_hf_hook") == (stays == {"hooks"})
    for name in stays:
        undo[name]()
    assert generate(of, pool) == expected("llama")
    assert set(vars(of)) - before <= {"forward"}  # accelerate leaves the model's own method there
    assert of.forward.__func__ is type(of).forward
    assert not of._forward_pre_hooks
    assert not of._forward_hooks


@pytest.mark.parametrize("first", ["patch", "hooks"])
def test_an_interrupted_forward_is_taken_back(first):
    """A KeyboardInterrupt inside an offloaded model leaves the cache as it was before the forward."""
    of = copy.deepcopy(model("llama"))
    steps = [lambda: paged_cache.patch(of), lambda: accelerate.cpu_offload(of)]
    for step in steps if first == "patch" else reversed(steps):
        step()
    pool = poisoned_pool(of)
    cache = PagedCache(pool)
    of.generate(**prompts((7,)), **GREEDY | {"max_new_tokens": 1}, past_key_values=cache)

    of.model.layers[1].forward = mock.Mock(side_effect=KeyboardInterrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        of(input_ids=torch.tensor([[5]]), past_key_values=cache)

    assert cache._state.open is None
    assert cache.get_seq_length() == 7
    paged_cache.unpatch(of)


def test_a_copy_of_a_patched_model_is_its_own(tmp_path):
    """A deep copy computes with its own weights, hooks and guard, not with those of the original."""
    of = offloaded(model("llama"), "hooks only", tmp_path)
    with paged_cache.patch(of):
        other = copy.deepcopy(of)
    with torch.no_grad():
        of.lm_head.weight.zero_()

    assert generate(other, poisoned_pool(other)) == expected("llama")
    paged_cache.unpatch(other)


def test_a_layer_that_computes_elsewhere_is_refused(tmp_path):
    """A layer whose K and V come from another device than its blocks are on: an error that names both, and whole blocks."""
    of = offloaded(model("llama"), "cpu", tmp_path)
    for module in of.modules():
        if hasattr(module, "_hf_hook") and module is not of:
            module._hf_hook.execution_device = torch.device("meta")
    pool = BlockPool.for_model(of, num_blocks=50, block_size=4)
    assert pool.devices == (torch.device("meta"),)
    for module in of.modules():
        if hasattr(module, "_hf_hook") and module is not of:
            module._hf_hook.execution_device = torch.device("cpu")

    with pytest.raises(InvalidRequestError, match=r"layer 0 gives keys on cpu, its blocks .* are on meta"):
        generate(of, pool)
    assert_whole(pool)
