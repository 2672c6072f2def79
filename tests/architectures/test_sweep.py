"""Every architecture of the installed transformers generates with a PagedCache what it generates with a DynamicCache."""

import contextlib
import functools
import gc

import pytest
import torch
from transformers import logging

import paged_cache
from paged_cache import BlockPool, PagedCache
from tests.architectures.exceptions import CHECKS_LEFT_OUT, LEFT_OUT, MODEL_DEFINED_LAYERS, STATE_ONLY
from tests.architectures.runs import CHECKS, NEW_TOKENS, checks_of, dynamic_cache, run
from tests.architectures.tiny import ARCHITECTURES, build

NUM_BLOCKS = 512
BLOCK_SIZE = 4
LEAST_DISTINCT_TOKENS = 4
CASES = [(name, check) for name in ARCHITECTURES if name not in LEFT_OUT for check in checks_of(name)]
IMPOSSIBLE = [(name, "greedy") for name in ARCHITECTURES if name in LEFT_OUT] + [
    (name, check) for check, names in CHECKS_LEFT_OUT.items() for name in names if name in ARCHITECTURES
]


@pytest.fixture(autouse=True)
def quiet_on_one_thread():
    """Tiny models are fastest on one thread, and their configs give rise to many warnings."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@functools.lru_cache(maxsize=1)
def tiny_model(name):
    """The model last asked for: the checks of one architecture follow each other."""
    return build(name)


@functools.lru_cache(maxsize=len(CHECKS))
def reference(name, check):
    """What the architecture generates with transformers' own cache."""
    model, extra_inputs = tiny_model(name)
    return run(model, extra_inputs, check, dynamic_cache(model))


def run_with_dynamic_cache(name, check):
    """Build, generate with transformers' own cache, and see that it was used."""
    model, extra_inputs = build(name)
    cache = dynamic_cache(model)
    run(model, extra_inputs, check, cache)
    assert cache.get_seq_length() > 0


def put_one_token_twice(cache):
    """Overwrite keys and values of the last token but two by those of the token before."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys[..., -3, :] = layer.keys[..., -4, :]
            layer.values[..., -3, :] = layer.values[..., -4, :]


def plain_layers(cache):
    """Classes of those layers that hold keys and values outside of the pool."""
    holding = [type(layer) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [kind.__name__ for kind in holding if kind.__module__.split(".")[0] != "paged_cache"]


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize(("name", "check"), CASES)
def test_same_tokens_as_dynamic_cache(name, check, patched):
    """A paged cache changes no token, keeps keys and values in its pool, and gives every block back."""
    model, extra_inputs = tiny_model(name)
    pool = BlockPool.for_model(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    cache = PagedCache(pool)
    with paged_cache.patch(model) if patched else contextlib.nullcontext():
        tokens = run(model, extra_inputs, check, cache)
    assert tokens.tolist() == reference(name, check).tolist()
    assert set(plain_layers(cache)) <= set(MODEL_DEFINED_LAYERS)
    pool.check()
    del cache
    if pool.num_free < pool.num_blocks:
        gc.collect()
    pool.check()
    assert pool.num_free == pool.num_blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in LEFT_OUT])
def test_reference_says_something(name):
    """The tiny model does not repeat itself: equal tokens would otherwise prove nothing."""
    for row in reference(name, checks_of(name)[0])[..., -NEW_TOKENS:]:
        assert len(row.unique()) >= LEAST_DISTINCT_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, check in CASES if check == "second turn" and name not in STATE_ONLY])
def test_one_wrong_token_is_noticed(name):
    """With the keys and values of one token in the place of another's, the tiny model goes on differently."""
    model, extra_inputs = tiny_model(name)
    disturbed = run(model, extra_inputs, "second turn", dynamic_cache(model), between_turns=put_one_token_twice)
    assert disturbed.tolist() != reference(name, "second turn").tolist()


@pytest.mark.parametrize(("name", "check"), IMPOSSIBLE)
def test_exception_is_still_needed(name, check):
    """What is left out fails with a DynamicCache too, or leaves it empty."""
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever transformers raises
        run_with_dynamic_cache(name, check)
