"""Requests of all data sets have the lengths and texts that their options say."""

import json

import pytest
from typer.testing import CliRunner

from paged_cache.bench import workload
from paged_cache.bench.models import load_tokenizer
from paged_cache.bench.results import Results
from paged_cache.bench.serving.datasets import Dataset
from paged_cache.cli import app
from paged_cache.errors import InvalidRequestError

CODE = "def add(first, second):\n    return first + second\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("shipped")


def talk(*texts):
    """A conversation of ShareGPT."""
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


@pytest.fixture
def sharegpt(tmp_path):
    """Two usable conversations, and others that are too short, too long, or have one turn."""
    entries = [talk(CODE, CODE * 2), talk(CODE * 2, CODE), talk("x", CODE), talk(CODE * 200, CODE), talk(CODE)]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_random_lengths_lie_around_the_mean():
    """Within the ratio of it, both ends reached; the seed decides; no ratio, no variation."""
    dataset = Dataset("random", 300, random_input_len=100, random_output_len=10, random_range_ratio=0.2)
    made = dataset.make(50, 5, seed=1)
    lengths = [len(prompt) - 5 for prompt in made.prompts]

    assert (min(lengths), max(lengths)) == (80, 120)
    assert (min(made.num_new), max(made.num_new)) == (8, 12)
    assert len({tuple(prompt[:5]) for prompt in made.prompts}) == 1
    assert made == dataset.make(50, 5, seed=1)
    assert made != dataset.make(50, 5, seed=2)
    assert set(Dataset("random", 9, random_output_len=4).make(50, 0, 0).num_new) == {4}


def test_prefixes_are_repeated():
    """Every prefix begins about as many prompts, in a shuffled order, with suffixes of their own."""
    lengths = {"prefix_repetition_prefix_len": 8, "prefix_repetition_suffix_len": 6}
    dataset = Dataset(
        "prefix_repetition", 10, prefix_repetition_num_prefixes=3, prefix_repetition_output_len=2, **lengths
    )
    made = dataset.make(1000, 0, seed=0)
    prefixes = [tuple(prompt[:8]) for prompt in made.prompts]

    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [3, 3, 4]
    assert {len(prompt) for prompt in made.prompts} == {14}
    assert len({tuple(prompt[8:]) for prompt in made.prompts}) == 10
    assert prefixes[:3] != prefixes[3:6] or prefixes[3:6] != prefixes[6:9]
    assert made.num_new == [2] * 10


def test_conversations_are_those_of_the_file(sharegpt, tokenizer):
    """Prompt and answer are the first two turns; what is too short, too long or has no answer is left out; then from the start."""
    made = Dataset("sharegpt", 5, sharegpt).make(2048, 3, 0, tokenizer)
    short, long = (tokenizer(CODE * times)["input_ids"] for times in (1, 2))
    pairs = [(prompt[3:], num_new) for prompt, num_new in zip(made.prompts, made.num_new, strict=True)]

    assert sorted(pairs[:2], key=lambda pair: len(pair[0])) == [(short, len(long)), (long, len(short))]
    assert pairs == [*pairs[:2], *pairs[:2], pairs[0]]
    assert Dataset("sharegpt", 2, sharegpt, sharegpt_output_len=7).make(2048, 0, 0, tokenizer).num_new == [7, 7]


def test_custom_prompts_are_those_of_the_file(tmp_path, tokenizer):
    """Texts of lines; lengths from the option or the file; a chat template is used unless it is to be skipped."""
    path = tmp_path / "custom.jsonl"
    path.write_text("".join(json.dumps({"prompt": CODE, "output_tokens": n}) + "\n" for n in (3, 5)), encoding="utf-8")
    own = Dataset("custom", 2, path, custom_output_len=-1).make(2048, 0, 0, tokenizer)
    plain = tokenizer(CODE)["input_ids"]

    assert sorted(own.num_new) == [3, 5]
    assert own.prompts == [plain, plain]
    assert Dataset("custom", 3, path, custom_output_len=9).make(2048, 0, 0, tokenizer).num_new == [9, 9, 9]
    chatty = load_tokenizer("shipped")
    chatty.chat_template = "{% for message in messages %}# {{ message.content }}{% endfor %}"
    said = chatty("# " + CODE, add_special_tokens=False)["input_ids"]  # a template brings its own
    assert Dataset("custom", 1, path).make(2048, 0, 0, chatty).prompts == [said]
    assert Dataset("custom", 1, path, skip_chat_template=True).make(2048, 0, 0, chatty).prompts == [plain]


@pytest.mark.parametrize("text", ["{", '{"a": 1}', '[{"conversations": 3}]', "[]", json.dumps([talk("x", "y")])])
@pytest.mark.parametrize("name", ["sharegpt", "custom"])
def test_other_files_are_refused(tmp_path, tokenizer, name, text):
    """The message names the file."""
    path = tmp_path / "file"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(InvalidRequestError, match=r"/file (is no file for|has no request)"):
        Dataset(name, 2, path).make(2048, 0, 0, tokenizer)


def test_texts_need_a_tokenizer(sharegpt):
    """Random models have none."""
    command = ["bench", "throughput", "--model", "tiny", "--dataset-name", "sharegpt", "--dataset-path", str(sharegpt)]
    result = CliRunner().invoke(app, command)

    assert result.exit_code == 1
    assert "the model tiny has random weights and no tokenizer" in result.output


def test_texts_are_served(sharegpt, tmp_path):
    """The shipped model serves conversations of a file, and settings say which ones."""
    path = tmp_path / "r.json"
    command = ["bench", "throughput", "--quick", "--model", "shipped", "--num-prompts", "2", "--only", "loop,sjf"]
    command += ["--dataset-name", "sharegpt", "--dataset-path", str(sharegpt), "--shared-prefix-len", "0"]
    result = CliRunner().invoke(app, [*command, "--threads", "1", "--output-json", str(path)], catch_exceptions=False)
    results = Results.load(path)

    assert result.exit_code == 0, result.output
    assert results.settings["dataset_path"] == str(sharegpt)
    assert "factor" not in results.settings
    assert [line.metrics["num_equal"] for line in results.lines] == [[2], [2]]


def test_traces_are_there_with_their_licence():
    """Every trace of the package has a line that says where it is from."""
    notes = (workload.TRACES / "README.md").read_text(encoding="utf-8")
    traces = sorted(path.name for path in workload.TRACES.glob("*.csv"))

    assert len(traces) == 4
    assert all(f"`{name}`" in notes for name in traces)
    assert notes.count("CC-BY-4.0") == 3
    assert notes.count("Apache-2.0") == 1
