"""Blocks that the pool evicts go to host memory and come back: the tokens stay those of `generate`."""

import copy

import peft
import pytest
import torch

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, PagedCache
from paged_cache.kernels.quantized import as_bytes
from paged_cache.memory.host_storage import CudaStopwatch, HostStorage
from paged_cache.memory.offload_costs import ENOUGH, REMEMBERED
from paged_cache.memory.prefix import exact_salt
from tests.batching.alone import alone, finish, prompt, tiny
from tests.models import TokenCounter, assert_whole, poisoned_pool

GREEDY = {"do_sample": False, "repetition_penalty": 5.0, "max_new_tokens": 24, "eos_token_id": None}
MODELS = ["llama", "gemma2", "mistral", "gpt2"]


def offloading_pool(of, num_blocks, num_host_blocks=200, block_size=4, always=True, **kwargs):
    """A pool with host memory; whatever is free, here or there, is NaN. `always`: whatever the times say, copies pay."""
    probe = BlockPool.for_model(of, num_blocks=1, block_size=block_size, **kwargs)
    pool = poisoned_pool(of, num_blocks, block_size, offload_memory=num_host_blocks * probe.nbytes, **kwargs)
    host, storage = pool.manager.host, pool.host_storage
    assert host.num_blocks == num_host_blocks

    def poison(blocks):
        for slab in storage.slabs:
            if slab.dtype.is_floating_point:
                slab.view(torch.uint8).view(slab.shape[0], -1)[blocks] = 0xFF  # NaN in every format
            else:
                slab[blocks] = 127

    poison(list(range(num_host_blocks)))
    host.on_free = poison
    if always:
        host.costs.pays_saving = lambda: True
        host.costs.pays_restoring = lambda num_blocks, num_tokens: True
    return pool


def serve(of, pool, requests, **settings):
    """Outputs of a batcher that expects short answers and is interrupted often, its statistics, and the tokens computed."""
    with ContinuousBatcher(of, pool, **settings) as batcher, TokenCounter(of) as counter:
        handles = [batcher.submit(ids, expected_tokens=1, **GREEDY) for ids in requests]
        while all(batcher.step() for _ in range(3)):
            pool.check()
            batcher._engine.scheduler.preempt()
        outputs = finish(batcher, handles)
        stats = batcher.stats()
    return [output.generated_tokens for output in outputs], stats, counter.tokens


def crowd():
    """Requests that start small and grow until they take blocks from each other."""
    return [prompt(9 + number, number) for number in range(8)]


@pytest.mark.parametrize("name", MODELS)
def test_preempted_requests_come_back(name):
    """In a pool that is far too small, preempted requests go on from host memory, with the tokens of `generate`."""
    of, requests = tiny(name), crowd()
    num_blocks = {"gemma2": 50, "mistral": 10}.get(name, 30)
    settings = {"max_num_seqs": 8}
    expected = [alone(of, ids, **GREEDY)[0] for ids in requests]
    without = poisoned_pool(of, num_blocks, 4)
    outputs, _, num_without = serve(of, without, requests, **settings)
    assert outputs == expected

    pool = offloading_pool(of, num_blocks)
    outputs, stats, num_with = serve(of, pool, requests, **settings)

    assert outputs == expected
    assert stats.num_preemptions > 0
    counts = pool.stats()
    assert counts.offloaded >= counts.num_offloaded > 0
    assert counts.restored > 0
    assert counts.not_offloaded == 0
    assert num_with < num_without
    assert_whole(pool)


def converse(of, pool, ids, **options):
    """One turn: the tokens, and how many entered the model."""
    with paged_cache.patch(of), TokenCounter(of) as counter:
        inputs = torch.tensor([ids], device=of.device)
        cache = PagedCache(pool, **options)
        output = of.generate(
            inputs, attention_mask=torch.ones_like(inputs), past_key_values=cache, **GREEDY | {"max_new_tokens": 5}
        )
        cache.release()
    return output[0, len(ids) :].tolist(), counter.tokens


def flood(of, pool, count=6):
    """Other prompts go through the pool until it has nothing else."""
    for number in range(count):
        converse(of, pool, prompt(60, 100 + number))


@pytest.mark.parametrize("name", MODELS)
def test_idle_conversations_come_back(name):
    """A conversation whose blocks the pool has given to others goes on from host memory."""
    of, ids = tiny(name), prompt(41, 7)
    pool = offloading_pool(of, {"gemma2": 50, "mistral": 18}.get(name, 25))
    answer, _ = converse(of, pool, ids)
    flood(of, pool)
    assert pool.stats().restored == 0
    ids = ids + answer + [11, 12]

    again, num_tokens = converse(of, pool, ids)

    assert again == alone(of, ids, **GREEDY | {"max_new_tokens": 5})[0]
    assert num_tokens < 12
    assert pool.stats().restored > 0
    pool.check()
    assert_whole(pool)


def test_rows_of_a_batch_come_back_together():
    """The rows of one call are brought back in one copy, blocks that they share once."""
    of, system = tiny("llama"), prompt(24, 3)
    pool, copies = offloading_pool(of, 40), []
    load = pool.manager.host.on_load
    pool.manager.host.on_load = lambda pairs: (copies.append(len(pairs)), load(pairs))
    rows = torch.tensor([system + prompt(9, 1), system + prompt(9, 2)])
    options = GREEDY | {"max_new_tokens": 3, "attention_mask": torch.ones_like(rows)}
    with paged_cache.patch(of):
        first = of.generate(rows, **options, past_key_values=PagedCache(pool))
        flood(of, pool, 8)
        copies.clear()
        again = of.generate(rows, **options, past_key_values=PagedCache(pool))

    assert torch.equal(first, again)
    assert copies == [6 + 2 * 2]


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3"])
def test_codes_and_scales_come_back(kv_dtype):
    """A pool of 8 bits has bit by bit what it had, scales included, and gives the tokens of a pool that is large enough."""
    of, ids = tiny("llama"), prompt(41, 7)
    pool = offloading_pool(of, 25, kv_dtype=kv_dtype)
    expected, _ = converse(of, BlockPool.for_model(of, num_blocks=100, block_size=4, kv_dtype=kv_dtype), ids)
    assert converse(of, pool, ids)[0] == expected
    before = content(pool, ids)
    flood(of, pool)
    assert pool.manager.host.counters.restored == 0

    again, num_tokens = converse(of, pool, ids)

    assert again == expected
    assert num_tokens < 10
    assert len(before) == len(pool.host_storage.slabs)
    assert all(map(torch.equal, before, content(pool, ids)))


def content(pool, ids):
    """What the pool has of a prompt's full blocks, as bytes."""
    with pool.manager.lock:
        row = pool.manager.new_sequence(pool.root_key(exact_salt(None), 0))
        pool.manager.take_prefix(row, ids, 40)
        slabs = [slab for slabs in pool.storage.slabs.values() for slab in slabs]
        found = [as_bytes(slab)[row.tables[0]].clone() for slab in slabs]
        pool.manager.release(row)
    return found


def test_what_keys_separate_stays_separate():
    """Host memory follows the keys of prefixes: salts, weights and cleared caches share nothing."""
    of, ids = copy.deepcopy(tiny("llama")), prompt(41, 7)
    pool = offloading_pool(of, 25)
    converse(of, pool, ids, cache_salt="a")
    flood(of, pool)
    assert converse(of, pool, ids, cache_salt="b")[1] >= 41
    flood(of, pool)
    assert converse(of, pool, ids, cache_salt="a")[1] < 10

    flood(of, pool)
    with torch.no_grad():
        of.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    tokens, num_tokens = converse(of, pool, ids, cache_salt="a")
    assert num_tokens >= 41
    assert tokens == alone(of, ids, **GREEDY | {"max_new_tokens": 5})[0]

    flood(of, pool)
    for forget in (pool.clear_prefix_cache, pool.invalidate):
        assert pool.stats().num_offloaded > 0
        forget()
        assert pool.stats().num_offloaded == 0
        assert converse(of, pool, ids, cache_salt="a")[1] >= 41
        flood(of, pool)
    pool.check()


def test_adapters_that_come_back_find_their_prefixes():
    """What was computed under an adapter waits in host memory while others are active, and serves nobody else."""
    of, ids = copy.deepcopy(tiny("llama")), prompt(41, 7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(of, config, adapter_name="one").eval()
    wrapped.add_adapter("two", config)
    wrapped.eval()
    pool = offloading_pool(of, 25)
    wrapped.set_adapter("one")
    tokens, _ = converse(of, pool, ids)
    wrapped.set_adapter("two")
    flood(of, pool)
    assert converse(of, pool, ids)[1] >= 41
    flood(of, pool)
    wrapped.set_adapter("one")

    again, num_tokens = converse(of, pool, ids)

    assert num_tokens < 10
    assert again == tokens


def test_copies_that_do_not_pay_are_not_made():
    """Where computing is cheaper, as measured, evicted blocks are dropped, what is in host memory stays there, and both show."""
    of, ids = tiny("llama"), prompt(41, 7)
    pool = offloading_pool(of, 25, always=False)
    costs = pool.manager.host.costs
    converse(of, pool, ids)
    flood(of, pool)
    offloaded = pool.stats().offloaded
    assert offloaded > 0
    costs._clock = lambda: 1e9
    for _ in range(REMEMBERED):
        costs.observe_copy(1, 1e6)
        costs.observe_forward(1000, 1e-3)

    tokens, num_tokens = converse(of, pool, ids)
    flood(of, pool)

    assert tokens == alone(of, ids, **GREEDY | {"max_new_tokens": 5})[0]
    assert num_tokens >= 41
    stats = pool.stats()
    assert (stats.offloaded, stats.restored) == (offloaded, 0)
    assert stats.not_offloaded > 0


def test_forwards_are_measured():
    """Long forwards of `generate` and of the batcher say what a prompt token takes, copies what a block takes."""
    of = tiny("llama")
    for use in (lambda pool, ids: converse(of, pool, ids), lambda pool, ids: serve(of, pool, [ids])):
        pool = offloading_pool(of, 40, always=False)
        assert pool.manager.host.costs.seconds_per_token is None
        for number in range(ENOUGH):
            use(pool, prompt(99, 1 + number))
        assert 0 < pool.manager.host.costs.seconds_per_token < 1
        flood(of, pool)
        assert 0 < pool.manager.host.costs.seconds_per_block < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_memory": "4 apples"}, "offload_memory is '4 apples'"),
        ({"offload_memory": 0}, "offload_memory is 0"),
        ({"offload_memory": 1.5}, r"offload_memory is 1.5; a float is a share"),
        ({"offload_memory": 10}, "offload_memory=10 is 10 bytes; one block alone takes"),
        ({"offload_memory": "1MiB", "prefix_caching": False}, "prefix_caching is False"),
    ],
)
def test_wrong_amounts(options, message):
    """What is no amount of memory, is too little, or could never be used, is refused by name."""
    with pytest.raises(InvalidRequestError, match=message):
        BlockPool.for_model(tiny("llama"), num_blocks=8, **options)


def test_amounts():
    """Bytes as an int or with a unit, or a share of what is free; none by default."""
    of = tiny("llama")
    plain = BlockPool.for_model(of, num_blocks=1, block_size=4)
    assert plain.host_storage is None
    assert plain.manager.host.num_blocks == 0
    for amount in (plain.nbytes * 3 + 1, f"{plain.nbytes * 3}"):
        pool = BlockPool.for_model(of, num_blocks=8, block_size=4, offload_memory=amount)
        assert pool.manager.host.num_blocks == 3
        assert pool.host_storage.nbytes == 3 * plain.nbytes
    pool = BlockPool.for_model(of, num_blocks=8, block_size=4, offload_memory=1e-4)
    assert pool.manager.host.num_blocks > 3


def test_a_pool_that_is_laid_out_again_forgets_host_memory():
    """When a layer turns out to have other shapes, host memory gets the new ones, and nothing of before is believed."""
    of = tiny("llama")
    pool = offloading_pool(of, 25)
    converse(of, pool, prompt(41, 7))
    flood(of, pool)
    layout = pool.storage.layout
    old = layout.specs[0]
    pool._confirmed.clear()
    pool.confirm(0, type(old)(old.window, old.key_heads, 2 * old.key_dim, old.value_heads, old.value_dim))
    assert pool.stats().num_offloaded == 0
    pool.check()

    pool.host_storage.save([(0, 0)])

    for slabs in pool.storage.slabs.values():
        assert [slab.shape[1:] for slab in pool.host_storage.slabs] == [slab.shape[1:] for slab in slabs]


@pytest.mark.gpu
def test_pinned_memory_on_cuda():
    """On CUDA host blocks are pinned, copies run on the current stream, bit by bit, and their times are measured."""
    of = copy.deepcopy(tiny("llama")).to("cuda")
    pool = offloading_pool(of, 25)
    assert all(slab.is_pinned() for slab in pool.host_storage.slabs)
    assert isinstance(pool.manager.host.stopwatch, CudaStopwatch)
    ids = prompt(41, 7)
    first, _ = converse(of, pool, ids)
    before = content(pool, ids)
    flood(of, pool)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again, num_tokens = converse(of, pool, ids)
    torch.cuda.synchronize()
    assert (again, num_tokens < 10) == (first, True)
    assert all(map(torch.equal, before, content(pool, ids)))
    flood(of, pool)
    assert 0 < pool.manager.host.costs.seconds_per_block < 1
    assert isinstance(pool.host_storage, HostStorage)
    assert_whole(pool)
