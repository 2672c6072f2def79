"""The model that the package carries, with its tokenizer: text in, text out, as `generate` would."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_cache import ContinuousBatcher
from paged_cache.assets import MODEL_PATH
from tests.batching.alone import alone, finish, padded
from tests.models import assert_whole, poisoned_pool

TEXTS = [
    "def mean(values):\n",
    "import os\nimport",
    "class Stack:\n    def __init__(self):\n",
    "for",
    "def is_prime(n):\n    if n < 2:\n        return",
]


@pytest.fixture(scope="module")
def model():
    """In fp32."""
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


@pytest.fixture(params=[True, False], ids=["prefixes shared", "nothing shared"])
def batcher(model, tokenizer, request):
    """A batcher that reads and writes text."""
    pool = poisoned_pool(model, num_blocks=200, block_size=16, prefix_caching=request.param)
    with ContinuousBatcher(model, pool, tokenizer=tokenizer, max_num_batched_tokens=24) as batcher:
        yield batcher
    del batcher
    assert_whole(pool)


def serve(batcher, **options):
    """All texts at once."""
    return finish(batcher, [batcher.submit(text, **options) for text in TEXTS])


def expected(model, reader, **options):
    """All texts, each alone."""
    return [alone(model, reader(text)["input_ids"], **options) for text in TEXTS]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 40},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 30, "seed": 5},
        {"num_beams": 3, "max_new_tokens": 20},
    ],
    ids=["greedy", "sampling", "beams"],
)
def test_text_is_that_of_generate(batcher, model, tokenizer, options):
    """Greedy, sampled and searched texts are those of each prompt alone."""
    outputs, rows = serve(batcher, **options), expected(model, tokenizer, **options)
    assert [padded(output.sequences) for output in outputs] == rows
    assert [output.text for output in outputs] == [tokenizer.decode(row[0], skip_special_tokens=True) for row in rows]


def test_stop_strings(batcher, model, tokenizer):
    """A text ends where one of its strings is complete, and the tokenizer need not be passed again."""
    options = {"do_sample": False, "max_new_tokens": 40, "stop_strings": ["return", "):\n"]}
    outputs, rows = serve(batcher, **options), expected(model, tokenizer, tokenizer=tokenizer, **options)
    assert [padded(output.sequences) for output in outputs] == rows
    assert "stop" in {output.finish_reason for output in outputs}
    for output in outputs:
        if output.finish_reason == "stop":
            assert any(string in output.text for string in options["stop_strings"])


def test_samples_that_stop_at_strings(batcher, model, tokenizer):
    """Each of several samples stops by itself."""
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 40, "stop_strings": ["\n"], "seed": 2}
    outputs, rows = serve(batcher, **options), expected(model, tokenizer, tokenizer=tokenizer, **options)
    found = [[tokenizer.decode(ids) for ids in output.sequences] for output in outputs]
    wanted = [
        [tokenizer.decode(ids[: len(got)]) for ids, got in zip(row, output.sequences, strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]
    assert found == wanted
    assert len({len(ids) for output in outputs for ids in output.sequences}) > 1
