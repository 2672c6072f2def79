"""The `paged-cache` command, as a user runs it: on the model of the package, on other models, and on what is none."""

import re
import sys

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
)
from typer.testing import CliRunner

from paged_cache.__main__ import main
from paged_cache.assets import MODEL_PATH
from paged_cache.cli import app
from paged_cache.demo import PROMPTS, Demo, Row, count_tokens
from paged_cache.loading import few_threads, is_causal, load
from paged_cache.optional import not_installed

VOCAB = 2048
NEW = 24
BERT = BertConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
GPT2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=1)


def run(*arguments):
    """The command with these arguments, in this process, on a terminal of 100 columns."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def save(folder, model, pads=True):
    """A folder with the model and the package's tokenizer, with its padding token or without."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    if not pads:
        tokenizer.pad_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def output_folder(tmp_path_factory):
    """Where the demo leaves its picture."""
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def shown(output_folder):
    """What `paged-cache demo` shows."""
    result = run("demo", "--output", output_folder)

    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def demo():
    """The demo on the package's model, before its first step."""
    model, tokenizer = load(MODEL_PATH)
    with few_threads(model):
        yield Demo(model, tokenizer, list(PROMPTS), NEW)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny GPT-2 whose tokenizer knows no padding."""
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel(GPT2), pads=False)


def numbers(text, line_start):
    """The numbers in the line that starts like this."""
    line = next(line for line in text.splitlines() if line.strip().startswith(line_start))
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", line.strip().removeprefix(line_start))]


def test_demo_shows_prompts_and_continuations(shown):
    """The text of every prompt is there, and the model went on."""
    for prompt in PROMPTS:
        assert prompt.strip().splitlines()[0] in shown
    assert shown.count("»") == len(PROMPTS)


def test_demo_is_identical_everywhere(shown):
    """All rows, both calls and the beam search give what transformers' own cache gives."""
    assert len(re.findall(r"^  \w  \d+ tokens  identical$", shown, re.MULTILINE)) == len(PROMPTS)
    assert len(re.findall(r" identical *$", shown, re.MULTILINE)) == len(PROMPTS) + 3
    assert "different" not in shown


def test_demo_compares_memory(shown):
    """Paged is less than dynamic, dynamic less than static, and each adds up."""
    static, dynamic, paged = (
        numbers(shown, name) for name in ("StaticCache(256)", "DynamicCache, padded", "PagedCache")
    )

    assert paged[0] < dynamic[0] < static[0]
    assert paged[1] == dynamic[1] == static[1]
    assert paged[3] < dynamic[3] < static[3]
    assert static[0] - static[1] == pytest.approx(static[2], abs=0.11)


def test_demo_shows_reuse(shown):
    """The second call computes only the end of its prompt."""
    first, second = numbers(shown, "first call"), numbers(shown, "second call")

    assert (first[1], first[2]) == (first[0], 0)
    assert second[1] < 32
    assert second[1] + second[2] == second[0]


def test_demo_draws_the_pool(shown, output_folder):
    """In the terminal with a legend, as a PNG, and as a page with as many cells as there are blocks."""
    assert re.search(r"^ +0  [A-D] [A-D] ", shown, re.MULTILINE)
    assert all(name in shown for name in ("batch", "second call", "beams", "cached", "free"))
    assert (output_folder / "pool.png").stat().st_size > 20_000
    page = (output_folder / "pool.html").read_text(encoding="utf-8")
    (num_blocks,) = re.findall(r"<p>(\d+) blocks of", page)
    cells = page[page.index('id="pool"') : page.index("</div>\n<h2>")]
    assert cells.count("title=") == int(num_blocks) > 0


def test_memory_is_what_the_tensors_take(demo):
    """Reserved bytes, worked out from the shapes."""
    rows = demo.batch()
    static, dynamic, paged = demo.memory(rows)
    per_token, (batch, width) = demo.pool.bytes_per_token, demo.inputs["input_ids"].shape
    held = {block for tables in demo.caches["batch"].block_tables for block in tables[0]}

    assert dynamic.reserved == batch * (width + NEW - 1) * per_token
    assert static.reserved == batch * 256 * per_token
    assert paged.reserved == len(held) * 16 * per_token
    assert paged.used == dynamic.used == static.used
    assert paged.used == sum(len(row.prompt) + min(len(row.generated), NEW - 1) for row in rows) * per_token


def test_second_call_and_beams_share_the_header(demo):
    """Tokens that entered the model, and blocks of eight beams."""
    first, second = demo.reuse()
    beams = demo.beams()
    header = first.num_prompt - first.num_prompt % 16

    assert (first.num_computed, first.num_decoded) == (first.num_prompt, 15)
    assert second.num_computed <= second.num_prompt - header + 16
    assert second.num_decoded == 15
    assert beams.num_separate >= 8 * (beams.num_prompt // 16)
    assert beams.num_blocks <= beams.num_prompt // 16 + 1 + 8 * 2
    assert beams.nbytes < beams.dynamic_nbytes / 5


def test_counting_tokens_leaves_no_hook(demo):
    """The model is as it was, also after an error."""
    with pytest.raises(KeyError), count_tokens(demo.model):
        raise KeyError

    assert not demo.model.get_input_embeddings()._forward_pre_hooks


def test_demo_on_another_model(tiny, tmp_path):
    """A folder, prompts of one's own, learned positions, no padding token."""
    result = run(
        "demo",
        "--model",
        tiny,
        "--prompt",
        "one",
        "--prompt",
        "one two three",
        "--max-new-tokens",
        5,
        "--output",
        tmp_path,
    )

    assert result.exit_code == 0, result.output
    assert "GPT2LMHeadModel" in result.output
    assert result.output.count("identical") == 5


def test_a_difference_is_shown_and_fails(tiny, tmp_path, monkeypatch):
    """Exit code 1, the row and where it differs."""
    monkeypatch.setattr(Demo, "batch", changed(Demo.batch))
    result = run("demo", "--model", tiny, "--max-new-tokens", 5, "--output", tmp_path)

    assert result.exit_code == 1
    assert "different from new token 2 on" in result.output


def changed(batch):
    """Another third token expected in the last row."""

    def with_a_difference(self):
        *rows, last = batch(self)
        expected = [*last.expected[:2], last.expected[2] + 1, *last.expected[3:]]
        return [*rows, Row(last.prompt, last.generated, expected)]

    return with_a_difference


def test_without_matplotlib_there_is_a_hint(tiny, tmp_path, monkeypatch):
    """The demo ends well and says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("demo", "--model", tiny, "--max-new-tokens", 5, "--output", tmp_path)

    assert result.exit_code == 0, result.output
    assert not_installed("matplotlib") in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["pool.html"]


def encoder(folder):
    """A model that sees what follows."""
    return save(folder, BertLMHeadModel(BERT))


def sequence_to_sequence(folder):
    """A model of a type without a causal language model."""
    T5Config(vocab_size=VOCAB).save_pretrained(folder)
    return folder


def without_keys(folder):
    """A model of states only."""
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return save(folder, MambaForCausalLM(config))


def without_tokenizer(folder):
    """Weights alone."""
    GPT2LMHeadModel(GPT2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "missing", "there is no folder"),
        (lambda folder: "no-such-model", "nor such an id"),
        (lambda folder: folder, "cannot load the config"),
        (encoder, "is not a causal language model"),
        (sequence_to_sequence, "is not a causal language model"),
        (without_keys, "keeps no keys and values"),
        (without_tokenizer, "cannot load the tokenizer"),
    ],
    ids=["missing folder", "missing id", "empty folder", "encoder", "seq2seq", "states only", "no tokenizer"],
)
def test_a_bad_model_is_one_line(make, says, tmp_path):
    """What is wrong, in one line on stderr, and an exit code."""
    result = run("demo", "--model", make(tmp_path), "--output", tmp_path / "out")

    assert result.exit_code == 1
    assert result.stderr.startswith("paged-cache: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("count", [0, 1, -3])
def test_too_few_tokens_are_refused(count):
    """Memory is compared after tokens were stored: there have to be two."""
    assert run("demo", "--max-new-tokens", count).exit_code == 2


def test_a_prompt_beyond_the_context_is_one_line(tiny, tmp_path):
    """Not an index error in the model."""
    result = run("demo", "--model", tiny, "--max-new-tokens", 600, "--output", tmp_path)

    assert result.exit_code == 1
    assert "context of 512" in result.stderr
    assert result.stderr.count("\n") == 1


def test_causal_models_are_told_from_others(demo):
    """By what they compute, whatever they are called."""
    assert is_causal(demo.model)
    assert not is_causal(BertLMHeadModel(BERT).eval())
    assert is_causal(BertLMHeadModel(BertConfig(**BERT.to_dict() | {"is_decoder": True})).eval())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["demo", "--help"]], ids=" ".join)
def test_help_and_version(arguments, monkeypatch, capsys):
    """What `python -m paged_cache` runs reads the command line; test_packaging.py runs it as a process of its own."""
    monkeypatch.setattr(sys, "argv", ["paged-cache", *arguments])
    with pytest.raises(SystemExit) as end:
        main()

    assert not end.value.code
    assert "paged" in capsys.readouterr().out
