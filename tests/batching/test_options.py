"""Options of a request: the batcher's own, those per prompt, and what is refused before anything is begun."""

import math
import pickle

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from paged_cache import InvalidRequestError
from paged_cache.batching.options import LISTS, OWN_OPTIONS, RequestOptions, per_prompt
from tests.batching.faults import GREEDY, PATIENCE, PROMPTS, Streamer, batching, expected, tokens

pytestmark = pytest.mark.timeout(30)


def test_options_of_each_prompt():
    """A list, a tuple, a tensor or an array means one for each prompt; lists and tuples by nature and all else are for all."""
    shared = {"eos_token_id": [7, 8], "bad_words_ids": [[1], [2], [3]], "seed": 4, "cache_salt": ("a", "b")}
    rows = per_prompt(
        {
            "max_new_tokens": [1, 2],
            "temperature": torch.tensor([0.5, 1.0]),
            "top_k": np.array([3, 4]),
            "streamer": [None, "b"],
            "priority": (2, 1),
            **shared,
        },
        2,
    )
    assert rows == [
        {"max_new_tokens": 1, "temperature": 0.5, "top_k": 3, "streamer": None, "priority": 2, **shared},
        {"max_new_tokens": 2, "temperature": 1.0, "top_k": 4, "streamer": "b", "priority": 1, **shared},
    ]


@pytest.mark.parametrize("name", ["max_new_tokens", "early_stopping", "max_time", "generation_config", *OWN_OPTIONS])
def test_options_of_another_length(name):
    """A list that has not one entry per prompt is refused, with both numbers."""
    with pytest.raises(InvalidRequestError, match=f"{name} has 3 entries for 2 prompts"):
        per_prompt({name: [1, 2, 3]}, 2)


def test_options_that_are_lists_exist():
    """Every name that is a list by nature is an option of `generate`."""
    others = {"logits_processor", "stopping_criteria", "constraints", "force_words_ids", "dola_layers"}
    assert vars(GenerationConfig()).keys() >= LISTS - others


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_id", 7),
        ("priority", None),
        ("priority", "high"),
        ("priority", math.nan),
        ("seed", "a"),
        ("seed", 1.5),
        ("seed", 2**64),
        ("timeout", 0),
        ("timeout", math.nan),
        ("timeout", "1"),
        ("expected_tokens", -3),
        ("expected_tokens", "x"),
        ("cache_salt", {"a"}),
        ("tenant", ["a"]),
        ("adapter_name", 3),
    ],
)
def test_values_that_make_no_sense(name, value):
    """The message names the option and the value."""
    with pytest.raises(InvalidRequestError, match=f"{name}.*{value!r}" if value != {"a"} else name):
        RequestOptions(**{name: value})


def changed(**values):
    """A config whose attributes were set afterwards, where nobody looks at them."""
    config = GenerationConfig()
    vars(config).update(values)
    return config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priority": [0, "x"]}, "prompt 1: priority"),
        ({"streamer": [None, 5]}, "prompt 1: streamer"),
        ({"streamer": Streamer()}, "one for 2 prompts"),
        ({"logits_processor": [[len], []]}, "logits_processor"),
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config is dict"),
        ({"max_new_tokens": "5"}, "prompt 0: max_new_tokens='5': a whole number"),
        ({"max_new_tokens": [5, 5.5]}, "prompt 1: max_new_tokens=5.5: a whole number"),
        ({"top_p": "0.9", "do_sample": True}, r"prompt 0: top_p='0.9': a number"),
        ({"max_time": [1, "2"]}, "prompt 1: max_time='2': a number"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5: a whole number"),
        ({"eos_token_id": "</s>"}, r"one of the options {.*'eos_token_id': '</s>'.*} has a wrong type: "),
        ({"logits_processor": len}, "logits_processor=<built-in function len>: a list is needed"),
        ({"num_return_sequences": "two"}, "num_return_sequences='two': a whole number"),
        ({"num_beams": 0}, "num_beams=0: at least 1"),
        ({"generation_config": changed(min_new_tokens=5.5)}, "prompt 0: min_new_tokens=5.5: a whole number"),
        ({"generation_config": changed(num_beams="2")}, "prompt 0: num_beams='2': a whole number"),
        ({"generation_config": GenerationConfig(num_return_sequences=0)}, "num_return_sequences=0: at least 1"),
    ],
)
def test_nothing_is_begun(options, words):
    """A wrong option of one prompt raises before any prompt is taken, and the batcher goes on as if nothing had been."""
    with batching() as batcher:
        with pytest.raises(InvalidRequestError, match=words):
            batcher.generate(PROMPTS[:2], **{**GREEDY, **options}, progress_bar=False)
        assert batcher.stats().num_waiting == 0
        assert tokens(batcher.generate(PROMPTS[:2], **GREEDY, progress_bar=False)) == expected(*PROMPTS[:2])


def test_whole_numbers_in_other_clothes():
    """numpy's, tensors of one, and floats without a fraction are what they were for transformers."""
    with batching() as batcher:
        for value in (np.int64(6), torch.tensor(6), 6.0):
            config = changed(max_new_tokens=value, do_sample=False, top_p=None)
            output = batcher.submit(PROMPTS[0], config).result(timeout=PATIENCE)
            assert [output.generated_tokens] == expected(PROMPTS[0])


def test_outputs_can_be_stored():
    """Pickle keeps tokens and text, and leaves the tokenizer out."""

    class Tokenizer:
        def __call__(self, text, **kwargs):
            return {"input_ids": PROMPTS[0]}

        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids))

        def __reduce__(self):
            raise AssertionError("the tokenizer is stored")

    with batching(tokenizer=Tokenizer()) as batcher:
        output = batcher.submit(PROMPTS[0], **GREEDY).result(timeout=PATIENCE)
    again = pickle.loads(pickle.dumps(output))
    assert again == output
    assert again.text == output.text == " ".join(map(str, output.generated_tokens))
