"""A paged pipeline gives what the unwrapped one gives, one input by one: same inputs, same options, same outputs."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.pipelines.pt_utils import KeyDataset, PipelineIterator
from transformers.pipelines.text_generation import ReturnType

from paged_cache.integrations import paged_pipeline
from tests.integrations.pipes import CHATS, GREEDY, TEMPLATE, TEXTS, assert_same, make_pipe, one_by_one, tiny_pipe
from tests.models import assert_whole, poisoned_pool

pytestmark = pytest.mark.timeout(60)

TOOL = {"type": "function", "function": {"name": "lookup", "description": "", "parameters": {}}}


class Upwards(LogitsProcessor):
    """Only tokens above the last one."""

    def __call__(self, input_ids, scores):
        ids = torch.arange(scores.shape[1])
        return scores.masked_fill(ids[None] <= input_ids[:, -1:] % 1000, float("-inf"))


class Rows(Dataset):
    """A dataset of records."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {"text": self.items[index], "label": index}


@pytest.fixture(scope="module")
def pipe():
    """The unwrapped pipeline."""
    return make_pipe()


@pytest.fixture(scope="module")
def chatty():
    """The same with a chat template."""
    return make_pipe(TEMPLATE)


@pytest.fixture(scope="module")
def wrap():
    """Wraps pipelines; every pool is whole in the end."""
    opened = {}

    def of(pipe, **settings):
        if id(pipe) not in opened:
            pool = poisoned_pool(pipe.model, num_blocks=300, block_size=16)
            opened[id(pipe)] = paged_pipeline(pipe, pool, max_num_batched_tokens=48, **settings)
        return opened[id(pipe)]

    yield of
    pools = [paged.pool for paged in opened.values()]
    for paged in opened.values():
        paged.close()
    opened.clear()
    del paged
    for pool in pools:
        assert_whole(pool)


def compare(paged, pipe, inputs=TEXTS, seeds=None, **options):
    """All inputs in one list, and the first one alone, against the unwrapped pipeline."""
    options = GREEDY | options
    options = {name: value for name, value in options.items() if value is not None}
    expected = one_by_one(pipe, inputs, seeds, **options)
    before = paged.batcher.stats()
    own = {} if seeds is None else {"seed": seeds}
    assert_same(paged(inputs, **own, **options), expected)
    own = {} if seeds is None else {"seed": seeds[0]}
    assert_same(paged(inputs[0], **own, **options), expected[0])
    after = paged.batcher.stats()
    assert sum(after.finished.values()) == sum(before.finished.values()) + len(inputs) + 1
    return expected


OPTIONS = {
    "greedy": {},
    "new text only": {"return_full_text": False},
    "full text": {"return_full_text": True},
    "text": {"return_text": True},
    "tensors": {"return_tensors": True},
    "return type": {"return_type": ReturnType.NEW_TEXT},
    "spaces": {"clean_up_tokenization_spaces": True},
    "special tokens kept": {"skip_special_tokens": False},
    "stop sequence": {"stop_sequence": "\n"},
    "beams": {"num_beams": 3},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 20},
    "beams as tensors": {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 30, "return_tensors": True},
    "prefix": {"prefix": "import os\n"},
    "prefix and total length": {"prefix": "import os\n", "max_new_tokens": None, "max_length": 40},
    "truncation": {"truncation": True, "tokenizer_encode_kwargs": {"max_length": 3}},
    "total length": {"max_new_tokens": None, "max_length": 30},
    "padding": {"padding": "max_length", "tokenizer_encode_kwargs": {"max_length": 24}},
    "padding and total lengths": {
        "padding": "max_length", "tokenizer_encode_kwargs": {"max_length": 24},
        "max_new_tokens": None, "max_length": 40, "min_length": 36, "return_tensors": True,
    },
    "no special tokens": {"add_special_tokens": False},
    "config": {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3), "max_new_tokens": None},
    "config, padding and total length": {
        "generation_config": GenerationConfig(max_length=33, do_sample=False), "max_new_tokens": None, "do_sample": None,
        "padding": "max_length", "tokenizer_encode_kwargs": {"max_length": 24}, "return_tensors": True,
    },
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "list of ends": {"eos_token_id": [1, 15, 16], "return_tensors": True},
    "processor": {"logits_processor": LogitsProcessorList([Upwards()])},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_the_same(wrap, pipe, name):
    """Each option of the call, of `generate` and of the tokenizer has the effect that it has without us."""
    compare(wrap(pipe), pipe, **OPTIONS[name])


MANY_ENDS = list(range(1, 400, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "pad_token_id": 0},
        {"num_beams": 3},
        {"num_beams": 3, "pad_token_id": 0},
    ],
    ids=["pad", "pad 0", "beams", "beams, pad 0"],
)
def test_sequences_that_end_early_are_padded_as_ever(wrap, pipe, options):
    """Behind the end of a sequence that is shorter than its sisters stands what `generate` writes there."""
    more = {"num_return_sequences": 3, "eos_token_id": MANY_ENDS, "return_tensors": True, "length_penalty": 0.1}
    expected = compare(wrap(pipe), pipe, seeds=[1, 2, 3, 4, 5], **more, **options)
    lasts = {record["generated_token_ids"][-1] for records in expected for record in records}

    assert lasts & {options.get("pad_token_id", 2), MANY_ENDS[0]} != set()


def test_the_default_length(wrap, pipe):
    """Nobody says how long: the pipeline's own default holds, not the batcher's."""
    ((_, output),) = compare(wrap(pipe), pipe, TEXTS[1:2], max_new_tokens=None, return_tensors=True)[0][0].items()

    assert len(output) > 100


SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.95}


@pytest.mark.parametrize(
    "options",
    [SAMPLING, SAMPLING | {"num_return_sequences": 3, "return_tensors": True}, SAMPLING | {"num_beams": 2}],
    ids=["one", "three", "beams"],
)
def test_sampling_with_a_seed_each(wrap, pipe, options):
    """A list of seeds gives what the unwrapped pipeline gives after `torch.manual_seed` of each."""
    first = compare(wrap(pipe), pipe, seeds=[7, 8, 9, 10, 11], **options)
    other = one_by_one(pipe, TEXTS, seeds=[17, 18, 19, 20, 21], **GREEDY | options)

    assert first != other


@pytest.mark.parametrize("options", [{}, {"return_full_text": False}, {"num_return_sequences": 2, "num_beams": 2}])
def test_chats_get_assistant_messages(wrap, chatty, options):
    """A chat and a list of chats are continued by a message, or in their last one if that is the assistant's."""
    expected = compare(wrap(chatty), chatty, CHATS, **options)

    if "return_full_text" not in options:
        assert [chat[0]["generated_text"][-1]["role"] for chat in expected] == ["assistant"] * 3
        assert [len(chat[0]["generated_text"]) for chat in expected] == [2, 3, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"continue_final_message": False},
        {"continue_final_message": True},
        {"tools": [TOOL]},
        {"documents": [{"title": "a", "text": "import sys"}]},
        {"tokenizer_encode_kwargs": {"chat_template": "{{ messages[0]['content'] }}"}, "continue_final_message": False},
    ],
    ids=["a new message", "the last message", "tools", "documents", "another template"],
)
def test_chats_are_rendered_as_ever(wrap, chatty, options):
    """Templates get tools, documents and what is to be continued."""
    compare(wrap(chatty), chatty, CHATS[:2], **options)


def test_long_prompts_get_a_hole(wrap, monkeypatch):
    """`handle_long_generation` cuts a prompt on the left, by the length of the answer."""
    pipe = make_pipe()
    monkeypatch.setattr(pipe.tokenizer, "model_max_length", 17)
    expected = compare(wrap(pipe), pipe, handle_long_generation="hole", return_tensors=True)

    assert max(len(one[0]["generated_token_ids"]) for one in expected) == 17


def test_holes_are_as_long_as_each_answer(wrap, monkeypatch):
    """With `max_new_tokens` of their own, prompts are cut by their own."""
    pipe = make_pipe()
    monkeypatch.setattr(pipe.tokenizer, "model_max_length", 17)
    options = {"handle_long_generation": "hole", "return_tensors": True, "do_sample": False}
    outputs = wrap(pipe)([TEXTS[4]] * 2, max_new_tokens=[3, 14], **options)

    assert outputs == [pipe(TEXTS[4], max_new_tokens=count, **options) for count in (3, 14)]


def test_empty_prompts_are_continued(wrap, pipe):
    """No token at all: `generate` begins with its first token, and so does the batcher."""
    texts = ["", "for", ""]
    expected = compare(wrap(pipe), pipe, texts, add_special_tokens=False)

    assert expected[0] == expected[2] != expected[1]


def test_settings_of_the_pipeline_hold(wrap):
    """Options that a pipeline was made with are those of its paged one; options of a call come first."""
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    pipe = make_pipe(return_full_text=False, generation_config=config, prefix="import re\n", stop_sequence=" re")
    paged = wrap(pipe)

    assert one_by_one(pipe, TEXTS) != one_by_one(pipe, TEXTS, stop_sequence="no such text")
    for options in ({}, {"return_full_text": True}, {"max_new_tokens": 9, "prefix": ""}):
        expected = one_by_one(pipe, TEXTS, **options)
        assert_same(paged(TEXTS, **options), expected)
        assert_same(paged(TEXTS[1], **options), expected[1])


def inputs_of(form, texts):
    """Texts or chats in one of the forms that are streams."""
    return {
        "generator": lambda: (text for text in texts),
        "iterator": lambda: iter(texts),
        "key dataset": lambda: KeyDataset(Rows(texts), "text"),
        "key dataset of a list": lambda: KeyDataset([{"text": text} for text in texts], "text"),
        "iterable dataset": lambda: Stream(texts),
        "sequence": lambda: Column(texts),
        "array": lambda: np.array(texts),
    }[form]()


class Stream(IterableDataset):
    """A dataset without a length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Column:
    """A column of `datasets`: a length and items, no list."""

    def __init__(self, items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def __getitem__(self, index):
        return self._items[index]


@pytest.mark.parametrize(
    "form", ["generator", "iterator", "key dataset", "key dataset of a list", "iterable dataset", "sequence", "array"]
)
def test_streams_of_texts(wrap, pipe, form):
    """Generators, iterators and datasets of texts give an iterator over the outputs, in order."""
    outputs = wrap(pipe)(inputs_of(form, TEXTS * 3), **GREEDY)

    assert isinstance(outputs, PipelineIterator)
    assert_same(list(outputs), one_by_one(pipe, TEXTS, **GREEDY) * 3)


def test_datasets_know_their_length_and_can_be_read_again(wrap, pipe):
    """`tqdm(paged(dataset))` has a total, and a second loop begins anew."""
    paged = wrap(pipe)
    outputs = paged(KeyDataset(Rows(TEXTS), "text"), **GREEDY)
    first = list(outputs)

    assert len(outputs) == len(TEXTS)
    assert list(outputs) == first == one_by_one(pipe, TEXTS, **GREEDY)
    with pytest.raises(TypeError, match="len"):
        len(paged((text for text in TEXTS), **GREEDY))


@pytest.mark.parametrize("form", ["generator", "iterator", "key dataset", "iterable dataset", "sequence"])
def test_streams_of_chats(wrap, chatty, form):
    """Chats may come from anywhere, too."""
    outputs = list(wrap(chatty)(inputs_of(form, CHATS), **GREEDY))

    assert_same(outputs, one_by_one(chatty, CHATS, **GREEDY))


def test_a_generator_of_messages_is_one_chat(wrap, chatty):
    """As in transformers, messages that come one by one are one chat, and tuples are lists."""
    paged = wrap(chatty)

    assert_same(paged((message for message in CHATS[1]), **GREEDY), chatty(CHATS[1], **GREEDY))
    assert_same(paged(tuple(TEXTS), **GREEDY), one_by_one(chatty, TEXTS, **GREEDY))


def test_nothing_in_nothing_out(wrap, pipe):
    """An empty list has no outputs, and neither have an empty generator and an empty dataset."""
    paged = wrap(pipe)

    assert paged([], **GREEDY) == []
    assert list(paged((text for text in []), **GREEDY)) == []
    assert list(paged(Rows([]), **GREEDY)) == []


def test_a_list_of_one_stays_a_list(wrap, pipe):
    """One text in a list is a list of one list of records."""
    (output,) = paged_output = wrap(pipe)(TEXTS[:1], **GREEDY)

    assert isinstance(paged_output, list)
    assert_same(output, pipe(TEXTS[0], **GREEDY))


def test_batch_size_and_workers_have_no_effect(wrap, pipe):
    """Scripts that guess a batch size go on working."""
    paged = wrap(pipe)
    expected = one_by_one(pipe, TEXTS, **GREEDY)

    assert paged(TEXTS, batch_size=2, num_workers=4, **GREEDY) == expected
    assert list(paged(KeyDataset(Rows(TEXTS), "text"), batch_size=64, num_workers=2, **GREEDY)) == expected


def test_lengths_and_streamers_of_their_own(wrap, pipe):
    """A list of `max_new_tokens` or of streamers has one for each input."""
    lengths = [3, 20, 1, 7, 12]
    streamers = [
        TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, timeout=5, skip_special_tokens=True) for _ in TEXTS
    ]
    options = {"do_sample": False, "return_full_text": False}
    outputs = wrap(pipe)(TEXTS, max_new_tokens=lengths, streamer=streamers, **options)

    expected = [pipe(text, max_new_tokens=count, **options) for text, count in zip(TEXTS, lengths, strict=True)]
    assert outputs == expected
    assert ["".join(streamer) for streamer in streamers] == [output[0]["generated_text"] for output in outputs]


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen3_next"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_other_models(wrap, name, options):
    """Windows, learned positions and linear attention: whatever the batcher serves."""
    pipe = tiny_pipe(name)
    compare(wrap(pipe), pipe, ["AB", "+,-./01", "0123456789:;<=>?ABC"], return_tensors=True, **options)
