"""Whatever people call a prompt becomes token ids; lists of options become those of each prompt."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from paged_cache import ContinuousBatcher, InvalidRequestError
from paged_cache.assets import MODEL_PATH
from paged_cache.batching.prompts import as_prompts, token_ids
from tests.batching.alone import alone, tiny
from tests.models import poisoned_pool

pytestmark = pytest.mark.timeout(30)

IDS = [5, 6, 7]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
CHAT = [{"role": "user", "content": "def add(a, b):"}]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}def{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped model's, with padding."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture
def chatty(tokenizer):
    """The same with a chat template."""
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        np.array(IDS),
        np.array([IDS], dtype=np.int16),
        [IDS],
        {"input_ids": IDS},
        {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3)},
    ],
    ids=lambda prompt: f"{type(prompt).__name__} {prompt}",
)
def test_forms_of_token_ids(prompt):
    """Lists, tensors and arrays of one prompt, with or without a dimension for the batch, are its ids as plain numbers."""
    ids = token_ids(prompt, None, 100)

    assert ids == IDS
    assert all(type(token) is int for token in ids)


def test_ids_are_a_copy():
    """The caller's list stays the caller's."""
    own = list(IDS)

    token_ids(own, None, 100).append(1)

    assert own == IDS


def test_text(tokenizer):
    """A string is what the tokenizer makes of it, its special tokens included."""
    assert token_ids("def add(a, b):", tokenizer, None) == tokenizer("def add(a, b):")["input_ids"]


def test_chat(chatty):
    """Chat messages go through the template, with the opening of an answer, and get no special tokens twice."""
    text = "user: def add(a, b):\ndef"

    assert token_ids(CHAT, chatty, None) == chatty(text, add_special_tokens=False)["input_ids"]
    assert token_ids(tuple(CHAT), chatty, None) == token_ids(CHAT, chatty, None)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        (torch.zeros(0, dtype=torch.long), "empty"),
        ([1, 100], "token id 100"),
        ([-1], "token id -1"),
        ([1.0, 2.0], "list"),
        (torch.tensor([1.5]), "Tensor"),
        ([True, False], "list"),
        (torch.zeros(2, 2, dtype=torch.long), "Tensor"),
        (3, "int"),
        (None, "NoneType"),
        ([IDS, IDS], "list"),
        ({"text": "a"}, "dict"),
        ("text", "tokenizer"),
        (CHAT, "tokenizer"),
    ],
    ids=str,
)
def test_prompts_that_are_none(prompt, words):
    """What cannot be read is refused, with what it was."""
    with pytest.raises(InvalidRequestError, match=words):
        token_ids(prompt, None, 100)


def test_chat_without_a_template(tokenizer):
    """Without a chat template, messages are refused and the way out is named."""
    with pytest.raises(InvalidRequestError, match="chat_template"):
        token_ids(CHAT, tokenizer, None)


# Many prompts


def test_padding_is_left_out(tokenizer):
    """A padded batch in any form is its rows without padding, on either side."""
    texts = ["def", "def add(a, b):", "import"]
    want = [tokenizer(text)["input_ids"] for text in texts]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        assert as_prompts(batch) == want
        assert as_prompts(batch["input_ids"], batch["attention_mask"]) == want
        assert as_prompts(tokenizer(texts, padding=True)) == want
        arrays = tokenizer(texts, return_tensors="np", padding=True)
        assert as_prompts(arrays) == want
        assert as_prompts(arrays["input_ids"], arrays["attention_mask"]) == want
        lists = batch["input_ids"].tolist()
        assert as_prompts(lists, batch["attention_mask"]) == want


def test_a_tensor_without_a_mask():
    """Each row is a prompt as it is."""
    assert as_prompts(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]


def test_any_iterable_of_prompts():
    """Generators and tuples are lists of prompts; no prompts are no prompts."""
    assert as_prompts(ids for ids in (IDS, IDS)) == [IDS, IDS]
    assert as_prompts((IDS, "text")) == [IDS, "text"]
    assert as_prompts([]) == []


@pytest.mark.parametrize(
    ("prompts", "mask"),
    [
        ("text", None),
        (IDS, None),
        (np.array(IDS), None),
        (torch.tensor(IDS), None),
        ({"text": "a"}, None),
        (7, None),
        (CHAT, None),
        (torch.tensor([IDS]), torch.ones(1, 2)),
        ([IDS, IDS], [[1, 1, 1]]),
        ([IDS], [[1, 1]]),
        (["text"], [[1]]),
    ],
    ids=str,
)
def test_lists_of_prompts_that_are_none(prompts, mask):
    """One prompt is no list of prompts, and a mask has to fit."""
    with pytest.raises(InvalidRequestError):
        as_prompts(prompts, mask)


def test_padding_without_a_mask():
    """A tensor's padding on the left is what `generate` takes for it: the padding token, unless that ends sequences."""
    rows = torch.tensor([[0, 0, 5, 0, 6], [1, 2, 3, 4, 5]])
    assert as_prompts(rows, pad_token_id=0) == [[5, 0, 6], [1, 2, 3, 4, 5]]
    assert as_prompts(rows) == rows.tolist()


def test_padded_tensor_without_a_mask_is_served():
    """Each row gets the tokens of its prompt without padding."""
    of = tiny("llama")
    rows = torch.tensor([[0, 0, 0, 15, 16], [11, 12, 13, 14, 15]])
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        outputs = batcher.generate(rows, **GREEDY, pad_token_id=0, progress_bar=False)
        as_they_are = batcher.generate(rows, **GREEDY, pad_token_id=0, eos_token_id=[0, 99], progress_bar=False)
    assert [o.generated_tokens for o in outputs] == [
        alone(of, ids, **GREEDY)[0] for ids in ([15, 16], rows[1].tolist())
    ]
    assert as_they_are[0].prompt_ids == rows[0].tolist()


def test_chat_that_cannot_be_read(chatty):
    """A template that raises rejects its own prompt; the others are answered."""
    of = AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True).eval()
    chatty.chat_template = "{{ messages[0].content.nothing.at.all }}"
    with ContinuousBatcher(of, poisoned_pool(of), tokenizer=chatty) as batcher:
        bad, good = batcher.generate([CHAT, "import os"], max_new_tokens=3, do_sample=False, progress_bar=False)
    assert bad.finish_reason == "rejected"
    assert "prompt 0: the chat does not suit the tokenizer's template" in str(bad.error)
    assert len(good.generated_tokens) == 3


def test_mixed_prompts_on_the_shipped_model(chatty):
    """Text, messages, ids and tensors in one call: each gets what `generate` gives, as tokens and as text."""
    of = AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True).eval()
    ids = chatty("import os")["input_ids"]
    prompts = ["def add(a, b):", CHAT, ids, torch.tensor([ids[:2]]), chatty("class A")]
    with ContinuousBatcher(of, poisoned_pool(of), tokenizer=chatty) as batcher:
        outputs = batcher.generate(prompts, max_new_tokens=8, do_sample=False, progress_bar=False)
        stopped = batcher.submit("def add(a, b):", max_new_tokens=40, stop_strings="\n").result(timeout=30)
    for prompt, output in zip(prompts, outputs, strict=True):
        want = token_ids(prompt, chatty, None)
        assert output.prompt_ids == want
        assert output.sequences == alone(of, want, max_new_tokens=8, do_sample=False)
        assert output.text == chatty.decode(output.generated_tokens, skip_special_tokens=True)
        assert output.texts == [output.text]
    assert stopped.finish_reason == "stop"
    assert stopped.text.count("\n") == 1


PADDED = torch.tensor([[1, 1, 1, *IDS]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("prompt", "mask"),
    [
        (PADDED, MASK),
        (PADDED[0], MASK[0]),
        (PADDED.numpy(), MASK.numpy()),
        (PADDED.tolist()[0], MASK.tolist()[0]),
        (PADDED[0], MASK.tolist()),
        ({"input_ids": PADDED, "attention_mask": MASK}, None),
        ({"input_ids": PADDED.tolist()[0], "attention_mask": MASK.tolist()[0]}, None),
        (PADDED, None),  # as `generate` does where padding is no token that ends a sequence
        ({"input_ids": PADDED}, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_padding_of_one_prompt(prompt, mask):
    """What a mask hides, or what is padding on the left of a batch of one, is no token, in `submit` as in `generate`."""
    of = tiny("gpt2")
    want = of.generate(PADDED, attention_mask=MASK, **GREEDY)[0, 6:].tolist()
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        given = {} if mask is None else {"attention_mask": mask}
        alone_ = batcher.submit(prompt, **given, **GREEDY).result(timeout=20)
        assert (alone_.prompt_ids, alone_.generated_tokens) == (IDS, want)
        if mask is None:
            first, second = batcher.generate([prompt, IDS], **GREEDY, progress_bar=False)
            assert (first.prompt_ids, first.generated_tokens) == (IDS, want)
            assert second.generated_tokens == want


@pytest.mark.parametrize(
    ("prompt", "mask", "words"),
    [
        (PADDED, torch.ones(1, 3), "attention_mask has 3 entries for a prompt of 6 tokens"),
        (IDS, [1, 1], "attention_mask has 2 entries for a prompt of 3 tokens"),
        (IDS, 1, "attention_mask=1: a 0 or 1 for each token"),
        (IDS, torch.ones(3, 3), "attention_mask=tensor.*: a 0 or 1 for each token"),
        (IDS, [0.0, -1e9, 0.0], "a 0 or 1 for each token"),
        (IDS, ["0", "1", "1"], "a 0 or 1 for each token"),
        ([5], [[0]], "the prompt is empty"),
        ("text", [1], "attention_mask goes with token ids"),
        (CHAT, [1], "attention_mask goes with token ids"),
    ],
)
def test_masks_that_do_not_fit(prompt, mask, words):
    """They are refused, with both lengths."""
    of = tiny("gpt2")
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher, pytest.raises(InvalidRequestError, match=words):
        batcher.submit(prompt, attention_mask=mask, **GREEDY)


def test_positions_of_ones_own():
    """They cannot be honoured, and are not left out in silence."""
    of = tiny("gpt2")
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        for ask in (batcher.submit, lambda ids, **options: batcher.generate([ids], **options)):
            with pytest.raises(
                InvalidRequestError, match="position_ids cannot be honoured: positions count the tokens"
            ):
                ask(IDS, position_ids=torch.arange(3)[None] + 10, **GREEDY)


@pytest.mark.parametrize("options", [{"max_length": 5}, {"generation_config": GenerationConfig(max_length=5)}])
def test_a_prompt_as_long_as_max_length(options):
    """It alone is rejected: `max_length` counts the prompt, and the others have room."""
    of = tiny("gpt2")
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        outputs = batcher.generate([IDS, [*IDS, 8, 9], IDS[:1]], do_sample=False, progress_bar=False, **options)
        assert [output.finish_reason for output in outputs] == ["length", "rejected", "length"]
        assert [len(output.generated_tokens) for output in outputs] == [2, 0, 4]
        assert "prompt 1: the prompt has 5 tokens, max_length=5 leaves none" in str(outputs[1].error)
        assert outputs[0].generated_tokens == alone(of, IDS, do_sample=False, **options)[0]
        with pytest.raises(ValueError, match="max_length"):
            batcher.submit([*IDS, 8, 9], **options)


def test_masks_of_several_prompts():
    """Tensors or arrays in a list, beside the prompts or in a tokenizer's output, as lists do."""
    of, longer = tiny("gpt2"), torch.tensor([[9, *IDS]])
    pairs = [
        ([PADDED[0], longer[0]], [MASK[0], torch.tensor([0, 1, 1, 1])]),
        ([PADDED, longer], [MASK.bool(), [[0, 1, 1, 1]]]),
    ]
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        for prompts, masks in pairs:
            for ask in ((prompts, {"attention_mask": masks}), ({"input_ids": prompts, "attention_mask": masks}, {})):
                outputs = batcher.generate(ask[0], **ask[1], **GREEDY, progress_bar=False)
                assert [output.prompt_ids for output in outputs] == [IDS, IDS]


@pytest.mark.parametrize("ends", [torch.tensor([90, 91]), np.array([90, 91]), [90, 91], 90])
def test_ends_and_padding(ends):
    """Tokens that end a sequence may be a tensor: they are looked at for what is padding."""
    of = tiny("gpt2")
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        config = GenerationConfig(pad_token_id=1, eos_token_id=ends)
        for options in ({"eos_token_id": ends}, {"generation_config": config}):
            assert batcher.submit(PADDED, **options, **GREEDY).result(timeout=20).prompt_ids == IDS
        only = torch.tensor([[1]])
        assert batcher.submit(only, **GREEDY).result(timeout=20).prompt_ids == [1]


def test_max_length_that_does_not_count(monkeypatch):
    """The model's own `max_new_tokens` wins over `max_length`, as in `generate`."""
    of = tiny("gpt2")
    monkeypatch.setattr(of.generation_config, "max_new_tokens", 4)
    with ContinuousBatcher(of, poisoned_pool(of)) as batcher:
        outputs = batcher.generate([IDS * 4, IDS], max_length=10, do_sample=False, progress_bar=False)
    assert [len(output.generated_tokens) for output in outputs] == [4, 4]
