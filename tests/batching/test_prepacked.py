"""Batchers on prepacked weights: the tokens of `generate`, the packed path is what ran, and the model is as before."""

import asyncio
import gc
import logging

import pytest
import torch

from paged_cache import (
    AsyncContinuousBatcher,
    BlockPool,
    ContinuousBatcher,
    InvalidRequestError,
    prepack_weights,
    prepacking,
)
from paged_cache.bench.models import make_model
from paged_cache.bench.workload import make_workload
from paged_cache.integrations import paged_pipeline
from tests.adapters.zoo import GREEDY, ZOOS, expected, make
from tests.architectures.tiny import build
from tests.batching.alone import alone, prompt
from tests.integrations.pipes import TEXTS, make_pipe
from tests.models import assert_whole, poisoned_pool
from tests.packed_calls import count_packed_calls

pytestmark = pytest.mark.skipif(not prepacking.packed_dtypes(), reason="torch has no oneDNN here")


@pytest.fixture
def calls(monkeypatch):
    """Numbers of rows that the packed path was called with."""
    return count_packed_calls(monkeypatch)


@pytest.fixture
def model():
    """A tiny model of its own."""
    return build("llama")[0]


def prepacked_layers(model):
    """How many there are."""
    return sum(type(module) is prepacking.PrepackedLinear for module in model.modules())


@pytest.mark.parametrize(("name", "factor", "least"), [("shipped", 8.0, 1), ("28m", 20.0, None)])
def test_tokens_of_a_trace(calls, monkeypatch, name, factor, least):
    """48 requests get the tokens that `generate` gives for each alone, with `DynamicCache`."""
    if least is not None:
        monkeypatch.setattr(prepacking, "MIN_PRODUCTS", least)
    of = make_model(name)
    workload = make_workload(48, factor, of.config.vocab_size, 0, 0)
    options = {"do_sample": False, "eos_token_id": None}
    pairs = list(zip(workload.prompts, workload.num_new, strict=True))
    want = [alone(of, ids, max_new_tokens=n, **options) for ids, n in pairs]
    assert not calls
    pool = poisoned_pool(of, num_blocks=400, block_size=16)
    with ContinuousBatcher(of, pool, prepack_weights=True) as batcher:
        assert prepacked_layers(of) > 10
        outputs = batcher.generate(workload.prompts, max_new_tokens=workload.num_new, **options)
    num_rows = len(calls)
    del batcher
    assert_whole(pool)

    assert [output.sequences for output in outputs] == want
    assert num_rows > 100
    assert max(calls) > 48
    assert not prepacked_layers(of)


def test_two_batchers_share_the_copies(calls, monkeypatch, model):
    """Closing one, or dropping it, leaves the other's copies where they are; the last one takes them along."""
    monkeypatch.setattr(prepacking, "MIN_PRODUCTS", 1)
    pool, ids = BlockPool.for_model(model, num_blocks=40), prompt(9)
    want = alone(model, ids, **GREEDY)
    with ContinuousBatcher(model, pool, prepack_weights=True) as first:
        packed = prepacking._packings[model.lm_head].copy.packed
        second, third = (ContinuousBatcher(model, pool, prepack_weights=True) for _ in range(2))
        second.close()
        del third
        gc.collect()
        assert prepacking._packings[model.lm_head].copy.packed is packed
        calls.clear()
        (output,) = first.generate([ids], **GREEDY)

    assert output.sequences == want
    assert calls
    assert not prepacked_layers(model)


def test_a_batcher_that_is_not_prepacked_leaves_layers_alone(model):
    """The option is off by default, and somebody else's copies stay."""
    pool = BlockPool.for_model(model, num_blocks=40)
    with ContinuousBatcher(model, pool):
        assert not prepacked_layers(model)
    with prepack_weights(model) as prepacked:
        ContinuousBatcher(model, pool, prepack_weights=True).close()
        assert prepacked_layers(model) == prepacked.num_layers


@pytest.mark.parametrize("zoo", list(ZOOS))
def test_rows_with_adapters(calls, monkeypatch, zoo):
    """Requests of several adapters in one batch get what each adapter gives alone."""
    monkeypatch.setattr(prepacking, "MIN_PRODUCTS", 1)
    of = make(ZOOS[zoo])
    names = [None, *list(of.peft_config)[:3]]
    requests = [(prompt(5 + 7 * i, i), name) for i, name in enumerate(names * 2)]
    want = [expected(of, ids, name, **GREEDY) for ids, name in requests]
    pool = poisoned_pool(of)
    assert not calls
    with ContinuousBatcher(of, pool, prepack_weights=True) as batcher:
        handles = [batcher.submit(ids, adapter_name=name, **GREEDY) for ids, name in requests]
        found = [handle.result().sequences for handle in handles]

    assert calls
    assert found == want


def test_asyncio_and_pipelines_have_the_option(calls, monkeypatch):
    """They hand it to their batcher, and closing them removes it."""
    monkeypatch.setattr(prepacking, "MIN_PRODUCTS", 1)
    pipe = make_pipe()
    want = pipe(TEXTS[0], max_new_tokens=8, do_sample=False)
    assert not calls
    with paged_pipeline(pipe, prepack_weights=True) as paged:
        assert paged(TEXTS[0], max_new_tokens=8, do_sample=False) == want
    assert calls
    assert not prepacked_layers(pipe.model)

    async def serve():
        pool = BlockPool.for_model(pipe.model, num_blocks=40)
        async with AsyncContinuousBatcher(pipe.model, pool, prepack_weights=True) as batcher:
            (output,) = await batcher.generate([[5, 6, 7]], max_new_tokens=4, do_sample=False)
            return prepacked_layers(pipe.model), output.finish_reason

    count, reason = asyncio.run(asyncio.wait_for(serve(), 60))
    assert count > 10
    assert reason in ("length", "stop")
    assert not prepacked_layers(pipe.model)


def test_without_onednn_it_says_so_and_serves(calls, monkeypatch, caplog, model):
    """A line in the log, and the tokens of always."""
    monkeypatch.setattr(prepacking, "packed_dtypes", tuple)
    pool, ids = BlockPool.for_model(model, num_blocks=40), prompt(9)
    with caplog.at_level(logging.INFO, "paged_cache"):
        batcher = ContinuousBatcher(model, pool, prepack_weights=True)
    with batcher:
        (output,) = batcher.generate([ids], **GREEDY)

    assert output.sequences == alone(model, ids, **GREEDY)
    assert not calls
    assert "linear layers of LlamaForCausalLM stay as they are: torch has no oneDNN here" in caplog.messages


def test_how_much_memory_it_takes_is_logged(caplog, model):
    """Layers and MiB."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    size = sum(layer.weight.nbytes for layer in layers) / 2**20
    with caplog.at_level(logging.INFO, "paged_cache"):
        ContinuousBatcher(model, BlockPool.for_model(model, num_blocks=40), prepack_weights=True).close()

    line = f"LlamaForCausalLM computes with copies of the weights of {len(layers)} linear layers: {size:.1f} MiB"
    assert line in caplog.messages


def test_a_wrong_option_is_named(model):
    """Before anything is changed."""
    pool, before = BlockPool.for_model(model, num_blocks=8), dict(vars(model))
    with pytest.raises(InvalidRequestError, match="prepack_weights='yes': True or False is needed"):
        ContinuousBatcher(model, pool, prepack_weights="yes")

    assert vars(model) == before


def test_the_measured_model_is_large_enough():
    """With the real limit, a decode step of four rows of the model of the benchmarks is packed."""
    layer = make_model("28m").model.layers[0].mlp.up_proj

    assert 4 * layer.in_features * layer.out_features >= prepacking.MIN_PRODUCTS
