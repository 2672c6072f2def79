"""Pipelines that tests share, and what the unwrapped one gives, one input by one."""

import functools
import math

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from paged_cache.assets import MODEL_PATH
from tests.batching.alone import tiny

TEXTS = [
    "def mean(values):\n",
    "import os\nimport",
    "class Stack:\n    def __init__(self):\n",
    "for",
    "def is_prime(n):\n    if n < 2:\n        return",
]
CHATS = [
    [{"role": "user", "content": "def add(a, b):"}],
    [{"role": "system", "content": "import os"}, {"role": "user", "content": "class Stack:"}],
    [{"role": "user", "content": "for i in"}, {"role": "assistant", "content": "range("}],
]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t['function']['name'] + '\n' }}{% endfor %}"
    "{% for d in documents or [] %}{{ d['text'] + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}def{% endif %}"
)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def make_tokenizer(chat_template=None):
    """The shipped model's."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)
    tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def shipped_model():
    """The shipped model, in fp32."""
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True).eval()


def make_pipe(chat_template=None, **kwargs):
    """A pipeline on the shipped model."""
    tokenizer = make_tokenizer(chat_template)
    return pipeline("text-generation", model=shipped_model(), tokenizer=tokenizer, device="cpu", **kwargs)


@functools.cache
def tiny_pipe(name):
    """A pipeline on a tiny random model, whose tokens are characters."""
    words = Tokenizer(WordLevel({chr(32 + number): number for number in range(90)}, unk_token=" "))
    words.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="!")
    return pipeline("text-generation", model=tiny(name), tokenizer=tokenizer, device="cpu")


def one_by_one(pipe, inputs, seeds=None, **options):
    """What the pipeline itself gives; before each input torch gets that input's seed."""
    outputs = []
    for number, item in enumerate(inputs):
        if seeds is not None:
            torch.manual_seed(seeds[number])
        outputs.append(pipe(item, **options))
    return outputs


def assert_same(found, expected):
    """Equal, down to types and nesting; scores but for rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    elif isinstance(expected, float):
        assert found == expected or math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-3)
    else:
        assert found == expected
