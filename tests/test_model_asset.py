"""The model that the package carries: small, complete, and worth generating with."""

import ast
import inspect
import json
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_cache.assets import MODEL_PATH

TEXTS = [
    "",
    "def f(x):\n\treturn x  \n\n\n",
    "  leading, trailing  ",
    "a\r\nb\rc\x0cd\x00e",
    "naïve = 'Füße – 漢字 🙂\u200b' , x ;y !",
    "x=1_000.5e-3;assert x!=y,'?' ...",
    inspect.getsource(textwrap),
]


@pytest.fixture(scope="module")
def model():
    """The model as a user loads it."""
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer as a user loads it."""
    return AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)


def complete(model, tokenizer, prompt, max_new_tokens=64):
    """The prompt and its greedy continuation."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def test_size():
    """The weights stay below 5 MB and the folder below 6 MB: every wheel and every clone carries them."""
    assert (MODEL_PATH / "model.safetensors").stat().st_size < 5_000_000
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) < 6_000_000


def test_is_a_grouped_query_llama_in_float32(model):
    """Greedy choices are compared token for token, so the weights are computed with in float32."""
    assert model.dtype == torch.float32
    assert model.config.model_type == "llama"
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1
    assert model.config.max_position_embeddings >= 4096
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_returns_any_text_unchanged(tokenizer, text):
    """Byte-level BPE without clean-up: decode undoes encode, whatever the bytes; the model's <|bos|> comes first."""
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens(model, tokenizer):
    """Three distinct special tokens, known to model and generation config alike; batches are padded on the left."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(ids)) == 3
    for config in (model.config, model.generation_config):
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == ids
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == model.config.vocab_size


def test_knows_python_it_has_not_seen(model, tokenizer):
    """Loss on a module that was held out: 3.23 nats per token when it was released; a uniform guess has 7.62."""
    held_out = json.loads((MODEL_PATH / "training.json").read_text())["corpus"]["held_out"]
    assert "textwrap.py" in held_out
    ids = tokenizer(inspect.getsource(textwrap), return_tensors="pt").input_ids[:, :1024]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 3.5


@pytest.mark.parametrize("prompt", ["def main():\n", "class Stack:\n    def push(self, item):\n"])
def test_continues_with_indented_python(model, tokenizer, prompt):
    """What it writes after a header is an indented body, and whole lines of it parse."""
    text = complete(model, tokenizer, prompt)
    body = text.removeprefix(prompt)
    assert body.startswith("    ")
    assert "\n    " in body
    assert any(parses(text, num_lines) for num_lines in range(prompt.count("\n") + 2, text.count("\n") + 1))


def parses(text, num_lines):
    """Whether the first lines of the text are Python."""
    try:
        ast.parse("".join(text.splitlines(keepends=True)[:num_lines]))
    except SyntaxError:
        return False
    return True
