"""What went wrong when other continuous batching for transformers was measured, and must not go wrong here."""

import copy
import threading
import time

import peft
import pytest
import torch
from transformers import LogitsProcessorList

from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, OutOfBlocksError
from tests.batching.alone import PAD, alone, finish, prompt, tiny
from tests.models import assert_whole, poisoned_pool

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}
STOPS = list(range(60, 100))
PATIENCE = 20


@pytest.fixture
def batcher():
    """A batcher around the tiny llama."""
    pool = poisoned_pool(tiny("llama"))
    with ContinuousBatcher(tiny("llama"), pool, max_num_batched_tokens=32) as batcher:
        yield batcher
    del batcher
    assert_whole(pool)


def expected(*prompts, **options):
    """What `generate` gives for each prompt alone: the first returned row."""
    return [alone(tiny("llama"), ids, **{**GREEDY, **options})[0] for ids in prompts]


def tokens(outputs):
    """Of each output."""
    return [output.generated_tokens for output in outputs]


def padded_batch(rows):
    """Left-padded `input_ids` and their `attention_mask`."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) >= torch.tensor([[width - len(r)] for r in rows]))}


@pytest.mark.parametrize("form", ["tensor", "mapping", "lists"])
def test_padding_is_no_part_of_a_prompt(batcher, form):
    """A padded batch is what its attention mask says: each row has the tokens that it has alone."""
    rows = [prompt(4), prompt(19), prompt(11)]
    batch = padded_batch(rows)
    if form == "mapping":
        outputs = batcher.generate(batch, progress_bar=False, **GREEDY)
    else:
        ids = batch["input_ids"] if form == "tensor" else batch["input_ids"].tolist()
        outputs = batcher.generate(ids, attention_mask=batch["attention_mask"].long(), progress_bar=False, **GREEDY)
    assert tokens(outputs) == expected(*rows)
    assert [output.prompt_ids for output in outputs] == rows


def test_outputs_of_different_lengths(batcher):
    """Rows that end early are short, not padded, and bring nothing down."""
    rows, lengths = [prompt(n) for n in (3, 17, 9, 6)], [2, 16, 1, 9]
    outputs = batcher.generate(rows, **{**GREEDY, "max_new_tokens": lengths}, progress_bar=False)
    assert tokens(outputs) == [expected(ids, max_new_tokens=n)[0] for ids, n in zip(rows, lengths, strict=True)]
    stopped = batcher.generate(rows, **{**GREEDY, "max_new_tokens": 30, "eos_token_id": STOPS}, progress_bar=False)
    assert tokens(stopped) == [expected(ids, eos_token_id=STOPS, max_new_tokens=30)[0] for ids in rows]
    assert len({len(ids) for ids in tokens(stopped)}) > 1


def with_adapters():
    """A llama of its own with random LoRA adapters one and two, one active."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    of = peft.get_peft_model(copy.deepcopy(tiny("llama")), config, adapter_name="one")
    of.add_adapter("two", config)
    return of.eval()


def lora_layers(of):
    """Layers with adapters."""
    return [layer for layer in of.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]


def switch(of):
    """The other adapter."""
    of.set_adapter("two")


def disable(of):
    """No adapter."""
    of.base_model.disable_adapter_layers()


def rescale(of):
    """The same adapter, stronger."""
    for layer in lora_layers(of):
        layer.set_scale("one", 5.0)


def merge_both(of):
    """Both adapters become part of the weights."""
    of.merge_adapter(["one", "two"])


def train(of):
    """A step of an optimizer."""
    with torch.no_grad():
        for layer in lora_layers(of):
            layer.lora_B["one"].weight.add_(0.5)


def copy_over(of):
    """Weights of the base model copied over in place."""
    with torch.no_grad():
        for layer in lora_layers(of):
            layer.base_layer.weight.copy_(torch.randn_like(layer.base_layer.weight))


CHANGES = [switch, disable, rescale, merge_both, train, copy_over]


@pytest.mark.parametrize("change", CHANGES)
def test_no_prefix_of_other_weights(change):
    """The same prompt after a change of adapters or weights has the tokens of the new ones."""
    of, ids = with_adapters(), prompt(30)
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool) as batcher:
        (before,) = batcher.generate([ids], progress_bar=False, **GREEDY)
        (again,) = batcher.generate([ids], progress_bar=False, **GREEDY)
        change(of)
        (after,) = batcher.generate([ids], progress_bar=False, **GREEDY)
        (warm,) = batcher.generate([ids], progress_bar=False, **GREEDY)
    assert before.generated_tokens == again.generated_tokens
    assert (before.cached_tokens, again.cached_tokens) == (0, 28)
    assert after.generated_tokens == warm.generated_tokens == alone(of, ids, **GREEDY)[0]
    assert (after.cached_tokens, warm.cached_tokens) == (0, 28)
    assert after.generated_tokens != before.generated_tokens


@pytest.mark.parametrize("change", CHANGES)
def test_change_while_a_request_runs(change):
    """What a request computed before a change is kept from those that come after, its further tokens as well."""
    of, ids = with_adapters(), prompt(30)
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool, max_num_batched_tokens=16) as batcher:
        running = batcher.submit(ids, **GREEDY | {"max_new_tokens": 20})
        waiting = batcher.submit(prompt(26, seed=3), **GREEDY, priority=1)
        for _ in range(5):
            batcher.step()
        assert not running.done
        change(of)
        finish(batcher)
        followed = ids + running.result().generated_tokens
        late = batcher.generate([ids, followed, prompt(26, seed=3)], progress_bar=False, **GREEDY)
    assert waiting.done
    assert tokens(late) == [alone(of, row, **GREEDY)[0] for row in (ids, followed, prompt(26, seed=3))]


def test_change_and_back_while_a_request_runs():
    """What was computed with adapter b is no prefix for adapter a, although the request began with a."""
    of, ids = with_adapters(), prompt(30)
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool) as batcher:
        running = batcher.submit(ids, **GREEDY | {"max_new_tokens": 30})
        batcher.step()
        of.set_adapter("two")
        finish(batcher)
        of.set_adapter("one")
        followed = ids + running.result().generated_tokens
        (output,) = batcher.generate([followed], progress_bar=False, **GREEDY)
    assert output.generated_tokens == alone(of, followed, **GREEDY)[0]
    assert output.cached_tokens == 28


def test_salts_keep_prefixes_apart(batcher):
    """Requests of different salts share nothing, those of one salt do."""
    ids = prompt(30)
    salts = ["mine", "yours", "mine", None, None]
    outputs = [batcher.submit(ids, cache_salt=salt, **GREEDY).result() for salt in salts]
    assert [output.cached_tokens for output in outputs] == [0, 0, 28, 0, 28]
    assert tokens(outputs) == expected(ids) * len(salts)


def test_prompt_that_never_fits(batcher):
    """It is rejected with the numbers; the others finish, and later ones are served."""
    rows = [prompt(5), prompt(3) * 2000, prompt(7)]
    good, oversize, other = batcher.generate(rows, progress_bar=False, **GREEDY)
    assert tokens([good, other]) == expected(rows[0], rows[2])
    assert oversize.finish_reason == "rejected"
    assert isinstance(oversize.error, OutOfBlocksError)
    needed = -(-(6000 + 8 - 1) // 4)
    assert all(number in str(oversize.error) for number in ("6000", str(needed), "600"))
    (later,) = batcher.generate([prompt(9)], progress_bar=False, **GREEDY)
    assert tokens([later]) == expected(prompt(9))


def test_beams_are_no_greedy_search(batcher):
    """`num_beams` is honoured, not dropped in silence."""
    ids = prompt(13)
    (output,) = batcher.generate([ids], progress_bar=False, **GREEDY, num_beams=4)
    assert tokens([output]) == expected(ids, num_beams=4)
    assert tokens([output]) != expected(ids)


class Slow:
    """A processor that takes its time."""

    def __call__(self, input_ids, scores):
        time.sleep(0.02)
        return scores


def test_max_time(batcher):
    """A request out of time ends with what it has; its neighbour goes on."""
    slow = batcher.submit(
        prompt(5),
        **GREEDY | {"max_new_tokens": 200},
        max_time=0.2,
        logits_processor=LogitsProcessorList([Slow()]),
    )
    other = batcher.submit(prompt(6), **GREEDY | {"max_new_tokens": 40})
    finish(batcher)
    assert slow.result().finish_reason == "timeout"
    assert 1 <= len(slow.tokens) <= 11
    assert [other.tokens] == expected(prompt(6), max_new_tokens=40)


def test_temperature_per_request(batcher):
    """Lists of sampling options and seeds are one for each prompt."""
    rows = [prompt(8)] * 4
    options = {"temperature": [0.3, 1.0, 2.5, 1.0], "top_k": [5, 50, 0, 50], "seed": [3, 3, 3, 4]}
    outputs = batcher.generate(rows, **GREEDY | {"do_sample": True}, **options, progress_bar=False)
    each = [dict(zip(options, values, strict=True)) for values in zip(*options.values(), strict=True)]
    assert tokens(outputs) == [expected(rows[0], do_sample=True, **own)[0] for own in each]
    assert len({tuple(ids) for ids in tokens(outputs)}) == 4


def test_cancelled_request_ends_for_who_waits(batcher):
    """An iterator in another thread ends, `result` returns, and there is one terminal event."""
    heard, events = [], []
    handle = batcher.submit(prompt(5), **GREEDY | {"max_new_tokens": 200})
    handle.add_listener(events.append)
    threads = [
        threading.Thread(target=lambda: heard.append(list(handle))),
        threading.Thread(target=lambda: heard.append(handle.result(PATIENCE).generated_tokens)),
    ]
    batcher.start()
    for thread in threads:
        thread.start()
    handle.cancel()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert handle.result().finish_reason == "abort"
    assert heard == [handle.tokens] * 2
    assert events == [*handle.tokens, None]
    handle.cancel()
    assert events.count(None) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_token", 3),
        ("cache_implementation", "static"),
        ("past_key_values", object()),
        ("assistant_model", object()),
        ("inputs_embeds", torch.zeros(1, 3, 32)),
        ("pixel_values", torch.zeros(1, 3, 8, 8)),
        ("output_attentions", True),
        ("use_cache", False),
        ("penalty_alpha", 0.6),
        ("constraints", [1]),
        ("adapter_name", "one"),
    ],
)
def test_option_that_cannot_be_honoured(batcher, name, value):
    """It is refused by its name at submit, and nothing is begun."""
    with pytest.raises((InvalidRequestError, ValueError, TypeError), match=name):
        batcher.submit(prompt(5), **GREEDY, **{name: value})
    assert not batcher.step()
    assert batcher.pool.num_free == batcher.pool.num_blocks


def test_pool_of_its_own_is_left_alone():
    """Requests that other code keeps on the pool survive a batcher that comes and goes."""
    of = tiny("llama")
    pool = BlockPool.for_model(of, num_blocks=60, block_size=4)
    for _ in range(3):
        with ContinuousBatcher(of, pool) as batcher:
            assert tokens(batcher.generate([prompt(9)], progress_bar=False, **GREEDY)) == expected(prompt(9))
        del batcher
        assert_whole(pool)
