"""Every architecture of the installed transformers: batched it gives what it gives alone, or the batcher refuses it."""

import pytest
import torch
from transformers import logging

from paged_cache import ContinuousBatcher, UnsupportedModelError
from tests.architectures.exceptions import LEFT_OUT
from tests.architectures.runs import ALWAYS
from tests.architectures.tiny import ARCHITECTURES, build
from tests.batching.alone import alone, differences, finish, prompt
from tests.batching.ways import DEPENDS, REFUSED, WAYS
from tests.models import assert_whole, poisoned_pool

LENGTHS = (5, 12, 20)
OPTIONS = {**ALWAYS, "max_new_tokens": 10}
NAMES = [name for name in ARCHITECTURES if name not in LEFT_OUT]
SEES_AHEAD = ("doge",)
"""Where the oldest supported transformers forgets the causal mask, unless there is padding."""


@pytest.fixture(autouse=True)
def quiet_on_one_thread():
    """Tiny models are fastest on one thread, and their configs give rise to many warnings."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def expected(name, of, ids):
    """What `generate` gives for this prompt alone."""
    if name not in SEES_AHEAD:
        return alone(of, ids, **OPTIONS)
    mask = torch.tensor([[0] + [1] * len(ids)])
    return of.generate(torch.tensor([[0, *ids]]), attention_mask=mask, **OPTIONS)[:, len(ids) + 1 :].tolist()


def refusal(name, of, pool):
    """The message with which the batcher refuses a model."""
    with pytest.raises(UnsupportedModelError) as caught:
        ContinuousBatcher(of, pool)
    assert type(of).__name__ in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens_as_alone(name):
    """Three prompts at once, in pieces of 8 tokens, have the tokens that each has alone; the table of ways is exact."""
    of = build(name)[0]
    pool = poisoned_pool(of, num_blocks=128)
    if of.config.is_encoder_decoder:
        assert "encoder-decoder" in refusal(name, of, pool)
        return
    if name in REFUSED:
        assert REFUSED[name] in refusal(name, of, pool)
        return
    try:
        batcher = ContinuousBatcher(of, pool, max_num_batched_tokens=8)
    except UnsupportedModelError:
        assert name in DEPENDS.split()
        return
    prompts = [prompt(length) for length in LENGTHS]
    with batcher:
        assert name in DEPENDS.split() or batcher.stats().forward == WAYS.get(name, "packed")
        outputs = finish(batcher, [batcher.submit(ids, **OPTIONS) for ids in prompts])
    assert not differences(outputs, [expected(name, of, ids) for ids in prompts])
    del batcher
    assert_whole(pool)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_oss"]
)
def test_most_used_models_are_packed(name):
    """What people run most needs no padding."""
    of = build(name)[0]
    of.set_attn_implementation("eager")  # sdpa leaves out gemma2's softcap, in some versions of transformers
    with ContinuousBatcher(of, poisoned_pool(of, num_blocks=64)) as batcher:
        assert batcher.stats().forward == "packed"


def test_table_has_no_others():
    """Architectures that are left out of the table of ways are left out for a reason."""
    assert not set(REFUSED) & (set(WAYS) | set(DEPENDS.split()))
    assert not set(WAYS) & set(DEPENDS.split())
    assert not (set(WAYS) | set(REFUSED)) & set(LEFT_OUT)
