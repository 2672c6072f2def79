"""transformers' own pipeline with `past_key_values=PagedCache(pool)`: it works as it is."""

import pytest

import paged_cache
from paged_cache import BlockPool, PagedCache
from tests.integrations.pipes import CHATS, GREEDY, TEMPLATE, TEXTS, make_pipe, one_by_one
from tests.models import assert_whole, maybe_patched

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def pipe():
    """With a chat template."""
    return make_pipe(TEMPLATE)


@pytest.fixture
def pool(pipe):
    """Whole in the end."""
    pool = BlockPool.for_model(pipe.model, num_blocks=100)
    yield pool
    assert pool.stats().allocated > 0
    assert_whole(pool)


@pytest.mark.parametrize("patched", [False, True], ids=["", "patched"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("item", [TEXTS[0], CHATS[1]], ids=["text", "chat"])
def test_one_input(pipe, pool, item, options, patched):
    """A text or a chat with a cache of its own gives what it gives without."""
    with maybe_patched(pipe.model, patched):
        output = pipe(item, past_key_values=PagedCache(pool), **GREEDY, **options)

    assert output == pipe(item, **GREEDY, **options)


@pytest.mark.parametrize("patched", [False, True], ids=["", "patched"])
def test_a_list_as_one_batch(pipe, pool, patched):
    """With `batch_size=len(inputs)` one cache holds a list: what that batch gives without it, and each text alone."""
    options = {"batch_size": len(TEXTS), **GREEDY}
    with maybe_patched(pipe.model, patched):
        outputs = pipe(TEXTS, past_key_values=PagedCache(pool), **options)

    assert outputs == pipe(TEXTS, **options) == one_by_one(pipe, TEXTS, **GREEDY)


def test_a_cache_each(pipe, pool):
    """Texts one by one, each with a cache of its own: that is how lists are served without batches."""
    with paged_cache.patch(pipe.model):
        outputs = [pipe(text, past_key_values=PagedCache(pool), **GREEDY) for text in TEXTS]

    assert outputs == one_by_one(pipe, TEXTS, **GREEDY)


def test_one_cache_is_for_one_call_of_generate(pipe, pool):
    """A list with one cache and smaller batches goes on with the cache of the batch before: not what anybody wants.

    As with a `DynamicCache`: shorter prompts have nothing left to compute, and raise.
    """
    with pytest.raises(RuntimeError):
        pipe(TEXTS, past_key_values=PagedCache(pool), **GREEDY)
