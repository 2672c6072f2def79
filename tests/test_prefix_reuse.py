"""What a prompt computes only once, and what must never be reused."""

import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from transformers import DynamicCache

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, PagedCache
from paged_cache.weights import WeightsVersion
from tests.models import TokenCounter, assert_whole, model, poisoned_pool, prompts

GREEDY = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
SYSTEM = torch.randint(10, 80, (40,), generator=torch.Generator().manual_seed(9)).tolist()


def with_system(*tails):
    """Left-padded prompts that all begin with SYSTEM."""
    rows = [SYSTEM + list(tail) for tail in tails]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def expected(of, inputs):
    """The tokens of a DynamicCache, row by row and without padding."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    alone = [(ids[mask.bool()][None], len(ids)) for ids, mask in rows]
    outputs = [of.generate(ids, **GREEDY, past_key_values=DynamicCache(config=of.config)) for ids, _ in alone]
    return torch.cat([output[:, -GREEDY["max_new_tokens"] :] for output in outputs])


def generate(of, pool, inputs, **kwargs):
    """New tokens, and how many tokens entered the model for them."""
    with TokenCounter(of) as counter:
        output = of.generate(**inputs, **GREEDY, **kwargs, past_key_values=PagedCache(pool, cache_salt=None))
    return output[:, -GREEDY["max_new_tokens"] :], counter.tokens


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "llama4"])
def test_second_prompt_computes_only_what_is_new(kind):
    """The shared system prompt enters the model once, for single prompts and for batches with different padding."""
    of = model(kind)
    pool = poisoned_pool(of)
    first, batch = with_system([11, 12, 13]), with_system([21], [31, 32, 33, 34, 35, 36], [41, 42])
    decoded = GREEDY["max_new_tokens"] - 1

    with paged_cache.patch(of):
        tokens, entered = generate(of, pool, first)
        assert entered == 43 + decoded
        assert torch.equal(tokens, expected(of, first))
        tokens, entered = generate(of, pool, first)
        assert entered == 43 - 40 + decoded
        assert torch.equal(tokens, expected(of, first))
        tokens, entered = generate(of, pool, batch)
        assert entered == 3 * (6 + decoded)
        assert torch.equal(tokens, expected(of, batch))
    assert pool.stats().prefix_hits == 40 + 40 + 40 - 5 + 40 - 4
    assert_whole(pool)


def test_identical_prompts_store_one():
    """Eight beams of one prompt hold it once, although `generate` expands the prompt before the model sees it."""
    of = model("llama")
    pool = BlockPool.for_model(of, num_blocks=400, block_size=16)
    ids = torch.randint(10, 80, (1, 2048 + 1), generator=torch.Generator().manual_seed(1))
    with paged_cache.patch(of):
        single = PagedCache(pool)
        of.generate(ids, **GREEDY, past_key_values=single)
        alone = pool.num_blocks - pool.num_free
        single.release()
        pool.clear_prefix_cache()
        beams = PagedCache(pool)
        of.generate(ids, **GREEDY, num_beams=8, past_key_values=beams)

    used = pool.num_blocks - pool.num_free
    assert used <= 1.1 * alone
    assert used == 2048 // 16 + len({table[0][-1] for table in beams.block_tables})


@pytest.mark.parametrize("patched", [False, True])
def test_for_prompt(patched):
    """`for_prompt` starts from what the pool holds; `generate` computes the rest, also expanded to beams."""
    of, inputs = model("llama"), with_system([11, 12, 13], [21, 22])
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        generate(of, pool, inputs)
        if not patched:
            paged_cache.unpatch(of)
        cache = PagedCache.for_prompt(pool, **inputs)
        assert cache.get_seq_length() == 40
        with TokenCounter(of) as counter:
            output = of.generate(**inputs, **GREEDY, past_key_values=cache)
        assert counter.tokens == 2 * (3 + 4)
        assert torch.equal(output[:, -5:], expected(of, inputs))
        beams = of.generate(**inputs, **GREEDY, num_beams=3, past_key_values=PagedCache.for_prompt(pool, **inputs))
    dynamic = of.generate(**inputs, **GREEDY, num_beams=3, past_key_values=DynamicCache(config=of.config))
    assert torch.equal(beams, dynamic)
    del cache
    assert_whole(pool)


def test_salt_separates_tenants():
    """Caches of different salts share nothing."""
    of, inputs = model("llama"), with_system([11])
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        of.generate(**inputs, **GREEDY, past_key_values=PagedCache(pool, cache_salt="a"))
        assert PagedCache.for_prompt(pool, **inputs, cache_salt="a").get_seq_length() == 40
        assert PagedCache.for_prompt(pool, **inputs, cache_salt="b").get_seq_length() == 0
        assert PagedCache.for_prompt(pool, **inputs).get_seq_length() == 0


@pytest.mark.parametrize("salt", [None, "a", (1, "a")])
def test_caches_and_batchers_share_prefixes(salt):
    """What a batcher computed under a salt, a cache of this salt takes, and one of a salt that only looks equal does not."""
    of, ids = model("llama"), SYSTEM[:17]
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool) as batcher:
        batcher.generate([ids], cache_salt=salt, max_new_tokens=2, progress_bar=False)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 17, dtype=torch.long)}
    assert PagedCache.for_prompt(pool, **inputs, cache_salt=salt).get_seq_length() == 16
    assert PagedCache.for_prompt(pool, **inputs, cache_salt=(True, "a")).get_seq_length() == 0


def optimizer_step(of, pool):
    """A training step."""
    optimizer = torch.optim.SGD(of.parameters(), lr=0.5)
    of(input_ids=torch.randint(10, 80, (1, 8)), labels=torch.randint(10, 80, (1, 8))).loss.backward()
    optimizer.step()


def load_state_dict(of, pool):
    """Other weights, copied in place."""
    of.load_state_dict({name: x * 1.5 for name, x in of.state_dict().items()})


def assign_state_dict(of, pool):
    """Other weights, as other parameters."""
    of.load_state_dict({name: x * 1.5 for name, x in of.state_dict().items()}, assign=True)
    of.tie_weights()


def inference_mode_write(of, pool):
    """A write under inference mode."""
    with torch.inference_mode():
        of.get_input_embeddings().weight.mul_(1.5)


def data_write(of, pool):
    """A write that torch does not count, and `invalidate`."""
    of.get_input_embeddings().weight.data.mul_(1.5)
    pool.invalidate()


CHANGES = [optimizer_step, load_state_dict, assign_state_dict, inference_mode_write, data_write]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_stale_prefix_after_weights_change(change):
    """After any change of the weights the prompt is computed anew, and right."""
    of, inputs = copy.deepcopy(model("llama")), with_system([11, 12])
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        generate(of, pool, inputs)
        change(of, pool)
        tokens, entered = generate(of, pool, inputs)
        assert entered == 42 + 4
        assert torch.equal(tokens, expected(of, inputs))
        assert generate(of, pool, inputs)[1] == 2 + 4


def lora(of, *names, seed=0):
    """The model with random LoRA adapters of these names."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(of, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped.eval()


def switch(of):
    """Another adapter."""
    of.set_adapter("b")


def rescale(of):
    """The same adapter, stronger."""
    for layer in of.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scaling["a"] *= 3


def replace(of):
    """Another adapter under the same name."""
    config = of.peft_config["a"]
    of.set_adapter("b")
    of.delete_adapter("a")
    torch.manual_seed(5)
    of.add_adapter("a", config)
    of.set_adapter("a")


def hotswap(of):
    """Weights copied over an adapter through `.data`, as peft's hot-swap does."""
    for name, x in of.named_parameters():
        if ".a." in name:
            x.data.copy_(torch.randn_like(x))


def merge(of):
    """The adapter merged into the base weights."""
    of.merge_adapter()


def merge_other(of):
    """Another adapter merged, then this one active again."""
    of.merge_adapter(["b"])


def unmerge(of):
    """Merged and unmerged: the base weights differ in their last bits."""
    of.merge_adapter()
    of.unmerge_adapter()


ADAPTER_CHANGES = [switch, rescale, replace, hotswap, merge, merge_other, unmerge]


@pytest.mark.parametrize("change", ADAPTER_CHANGES, ids=lambda change: change.__name__)
def test_no_stale_prefix_after_adapter_change(change):
    """After any change of the adapters the prompt is computed anew, and right."""
    of, inputs = lora(copy.deepcopy(model("llama")), "a", "b"), with_system([11, 12])
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        first, _ = generate(of, pool, inputs)
        change(of)
        tokens, entered = generate(of, pool, inputs)
        assert entered == 42 + 4
        assert torch.equal(tokens, expected(of, inputs))
        if change not in (unmerge, merge):  # these compute the same up to rounding
            assert not torch.equal(tokens, first)


def test_prefix_survives_switching_back():
    """Each adapter, and the base model, keeps its own prefixes."""
    of, inputs = lora(copy.deepcopy(model("llama")), "a", "b"), with_system([11, 12])
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        for adapter in ("a", "b", "a", "b"):
            of.set_adapter(adapter)
            tokens, entered = generate(of, pool, inputs)
            assert torch.equal(tokens, expected(of, inputs))
        assert entered == 2 + 4
        with of.disable_adapter():
            assert generate(of, pool, inputs)[1] == 42 + 4
            tokens, entered = generate(of, pool, inputs)
            assert entered == 2 + 4
            assert torch.equal(tokens, expected(of, inputs))


def test_mixed_adapter_batch_shares_nothing():
    """peft's own mixed batches compute the same rows with other weights: nothing of them is shared or kept."""
    of, inputs = lora(copy.deepcopy(model("llama")), "a", "b"), with_system([11], [11], [11])
    names = ["a", "b", "__base__"]
    pool = poisoned_pool(of)
    dynamic = of.generate(**inputs, **GREEDY, adapter_names=names, past_key_values=DynamicCache(config=of.config))
    with paged_cache.patch(of):
        paged = of.generate(**inputs, **GREEDY, adapter_names=names, past_key_values=PagedCache(pool))
        assert torch.equal(paged, dynamic)
        assert pool.num_cached == 0


def test_adapter_that_comes_and_goes_while_a_row_decodes():
    """What was computed with adapters that were injected and taken out again between two tokens is not shared."""
    of = copy.deepcopy(model("llama"))
    ids = prompts()["input_ids"][-1:, -6:]
    pool = poisoned_pool(of)
    with paged_cache.patch(of), torch.no_grad():
        cache = PagedCache(pool)
        of(ids, past_key_values=cache)
        wrapped = lora(of, "a")
        for token in range(20, 30):
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            of(ids[:, -1:], past_key_values=cache)
        wrapped.unload().eval()
        del cache
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens, entered = generate(of, pool, inputs)
        assert torch.equal(tokens, expected(of, inputs))
        assert entered == 16 - 4 + 4


def test_hash_collisions_are_no_hits():
    """Token ids whose hashes collide in Python are told apart."""
    of = model("llama")
    pool = BlockPool.for_model(of, num_blocks=50, block_size=4)
    key = pool.root_key(None, 0)
    manager = pool.manager
    from paged_cache.memory.growth import Growth

    row = manager.new_sequence(key)
    manager.extend([Growth(row, 4, [-1, 5, -1, 7])])
    manager.commit(row)
    assert hash((-1, 5, -1, 7)) == hash((-2, 5, -2, 7))
    assert manager.match(manager.new_sequence(key), [-2, 5, -2, 7], 4) == 0
    assert manager.match(manager.new_sequence(key), [-1, 5, -1, 7], 4) == 4


@pytest.mark.parametrize("extra", ["inputs_embeds", "position_ids", "holes", "training", "token_type_ids"])
def test_what_is_not_shared(extra):
    """Forwards whose K and V may depend on more than the tokens leave nothing behind and take nothing."""
    of, inputs = copy.deepcopy(model("llama")), with_system([11, 12])
    pool = poisoned_pool(of)
    with paged_cache.patch(of), torch.no_grad():
        generate(of, pool, inputs)
        known = pool.num_cached
        if extra == "inputs_embeds":
            inputs["inputs_embeds"] = of.get_input_embeddings()(inputs.pop("input_ids"))
        elif extra == "position_ids":
            inputs["position_ids"] = torch.arange(42)[None] + 7
        elif extra == "holes":
            inputs["attention_mask"][0, 3] = 0
        elif extra == "training":
            of.train()
        else:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        cache = PagedCache(pool)
        of(**inputs, logits_to_keep=1, past_key_values=cache)
        assert cache._state.root_keys is None
        assert len(cache.block_tables[0][0]) == 11
        assert pool.stats().prefix_hits == 0
    del cache
    assert pool.num_cached == known


def test_prefix_caching_off():
    """`prefix_caching=False` keeps nothing."""
    of, inputs = model("llama"), prompts()
    pool = poisoned_pool(of, prefix_caching=False)
    with paged_cache.patch(of):
        of.generate(**inputs, **GREEDY, past_key_values=PagedCache(pool))
    assert pool.num_cached == 0
    assert pool.num_free == pool.num_blocks


def test_a_first_look_from_many_threads():
    """Threads that ask for the weights' state for the first time at once see the same one."""
    of = copy.deepcopy(model("llama"))
    for _ in range(20):
        version, keys = WeightsVersion(of), []
        together = threading.Barrier(4)

        def look(version=version, keys=keys, together=together):
            together.wait(10)
            keys.append((version.key(), version.light_key()))

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        keys.append((version.key(), version.light_key()))
        assert len(set(keys)) == 1
        assert len(keys) == 5


def test_modules_that_come_and_go():
    """The quick look sees a module that is replaced, added or taken away anywhere, even one at another's old address."""
    of = copy.deepcopy(model("llama"))
    version, layer = WeightsVersion(of), of.model.layers[0]

    def swap():
        layer.mlp = copy.deepcopy(layer.mlp)

    def add_to_what_had_none():
        layer.mlp.act_fn.extra = torch.nn.Identity()

    def take_away():
        del layer.mlp.act_fn.extra

    def replace_the_dict():
        layer._modules = {**layer._modules, "mlp": copy.deepcopy(layer.mlp)}

    def take_the_address():
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.nn.Tanh()

    seen = [version.light_key()]
    for change in (swap, add_to_what_had_none, take_away, replace_the_dict, take_the_address):
        assert version.light_key() == seen[-1]
        change()
        seen.append(version.light_key())
    assert len(set(seen)) == len(seen)


def test_looking_keeps_nothing_alive():
    """Neither a module that was replaced, nor a model that one of its modules knows."""
    of = copy.deepcopy(model("llama"))
    version, layer = WeightsVersion(of), of.model.layers[0]
    layer.owner = [of]
    version.light_key()
    replaced, layer.mlp = weakref.ref(layer.mlp), copy.deepcopy(layer.mlp)
    gc.collect()
    assert replaced() is None

    remains = weakref.ref(of)
    version.light_key()
    del of, layer
    gc.collect()
    assert remains() is None
    assert version.light_key() is None


def test_modules_of_torchscript():
    """Their children are in no plain dict: generation goes on."""
    of = copy.deepcopy(model("llama"))
    inputs = prompts((9, 14))
    expected = of.generate(**inputs, **GREEDY).tolist()
    for layer in of.model.layers:
        layer.mlp.act_fn = torch.jit.trace(torch.nn.Sequential(torch.nn.SiLU()), torch.ones(2))
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        for _ in range(2):
            assert of.generate(**inputs, **GREEDY, past_key_values=PagedCache(pool)).tolist() == expected
