"""`paged-cache plan`, as a user runs it."""

import json
import time

import huggingface_hub
import pytest
import torch
from transformers import BertConfig, MambaConfig, ViTConfig
from typer.testing import CliRunner

from paged_cache import loading
from paged_cache.assets import MODEL_PATH
from paged_cache.cli import app
from paged_cache.planning import plan
from tests.planning import published
from tests.planning.published import config_of


def run(*arguments):
    """The command with these arguments, on a wide terminal."""
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The config.json of Llama-3-8B, in a folder without weights."""
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(published.LLAMA_3_8B))
    return path


def test_tables(llama):
    """The formula, the memory, the requests, and the line of code are shown."""
    result = run(llama, "--memory", "24GiB", "--prompt-len", 1000, "--output-len", 201)

    assert result.exit_code == 0, result.output
    for text in (
        "32 layers × 2 (K, V) × 8 KV heads × 128 dims × 2 bytes = 128 KiB",
        "GQA: 32 query heads share 8 KV heads",
        "14.96 GiB",
        "8.03e9 parameters",
        "3,400 blocks of 16 tokens (2 MiB each): 54,400 tokens",
        "contiguous",
        "BlockPool.for_model(model, num_blocks=3400)",
    ):
        assert text in result.output


def test_json(llama):
    """With --json the output is one JSON object with the numbers of the tables, the same for a file and its folder."""
    file, folder = (
        json.loads(run(where, "--memory", "24GiB", "--prompt-len", 512, "--output-len", 128, "--json").output)
        for where in (llama, llama.parent)
    )

    assert file == folder
    assert (file["bytes_per_token"], file["num_blocks"], file["kv_dtype"]) == (131072, 3400, "bfloat16")
    assert file["paged"]["num_requests"] == 3400 // 40
    assert file["code"] == "BlockPool.for_model(model, num_blocks=3400)"


def test_windows_states_and_sharing_in_words(tmp_path):
    """Windows, beams, a shared prefix and 8 bits appear in words."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published.GPT_OSS_20B))
    result = run(path, "--memory", "24GiB", "--kv-dtype", "int8", "--num-beams", 2, "--shared-prefix-len", 400)

    assert result.exit_code == 0, result.output
    for text in (
        "12 layers of window 128",
        "at most 144 tokens held",
        "2 rows each",
        "once for all",
        "2 groups",
        "prompts read in chunks (ContinuousBatcher)",
        "in one call of generate",
        "int8 with scales",
    ):
        assert text in result.output


def test_the_model_of_the_package():
    """A folder with a model, a share of the free memory, and a trace."""
    result = run(MODEL_PATH, "--memory", "0.5", "--trace", "azure", "--trace-scale", 64, "--context", 512)

    assert result.exit_code == 0, result.output
    assert "on average" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "12GiB"), "4.158 GiB more than there is"),
        (("--memory", "24"), "did you mean '24GiB'?"),
        (("--memory", "12QB"), "memory is '12QB'; write it like '2GiB'"),
        (("--memory", "24GiB", "--weights-memory", "much"), "weights_memory is 'much'"),
        (("--memory", "24GiB", "--weights-memory", "0.5"), "weights_memory is '0.5'; it is no share"),
        (("--memory", "24GiB", "--weights-memory", "3GB", "--no-weights"), "the weights are left out (--no-weights)"),
        (("--memory", "24GiB", "--trace-scale", "3"), "--trace-scale is 3.0, but there is no --trace"),
        (("--memory", "24GiB", "--trace", "azure", "--trace-scale", "nan"), "the scale of the trace is nan"),
        (("--memory", "24GiB", "--context", "0"), "context is 0; it has to be at least 1"),
        (("--memory", "24GiB", "--trace", "nowhere.csv"), "there is no trace nowhere.csv"),
    ],
)
def test_errors_are_one_line(llama, options, message):
    """What is wrong, in one line and with exit code 1."""
    result = run(llama, *options)

    assert result.exit_code == 1
    assert message in result.output
    assert result.output.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(num_hidden_layers=2), "keeps no K and V"),
        (BertConfig(num_hidden_layers=2), "'bert' is an encoder"),
        (ViTConfig(num_hidden_layers=2), "no model that generates text for the model type 'vit'"),
    ],
)
def test_models_without_keys_and_values(tmp_path, config, message):
    """State-space models, encoders and models of pictures are refused with the reason."""
    config.save_pretrained(tmp_path)
    result = run(tmp_path, "--memory", "1GiB")

    assert result.exit_code == 1
    assert message in result.output


def test_without_lengths_they_are_those_of_a_trace(llama):
    """The workload is named, and paging fits several times the requests of a padded batch."""
    shown = run(llama, "--memory", "24GiB").output
    made = plan(llama, memory="24GiB")

    assert "256 conversations of a trace (Azure 2023, --trace azure)" in " ".join(shown.split())
    assert "equally long" not in shown
    assert made.paged.num_requests > 3 * made.padded.num_requests > 0


def test_equal_lengths_waste_nothing(llama):
    """One sentence says why a padded batch is as good there."""
    shown = run(llama, "--memory", "24GiB", "--prompt-len", 100, "--output-len", 29).output

    assert "All requests are equally long: a padded batch wastes nothing there." in " ".join(shown.split())


def test_memory_that_was_not_given_is_named(llama):
    """Without --memory, or with a share, it is said whose memory is planned."""
    whole, share = (plan(MODEL_PATH, memory=memory) for memory in (None, "0.5"))
    where = "the GPU of this machine" if torch.cuda.is_available() else "the RAM of this machine, which has no GPU"

    assert whole.memory_source == f"what is free now in {where}; --memory plans for another one"
    assert share.memory_source.startswith(f"50% of what is free now in {where}")
    assert plan(llama, memory="24GiB").memory_source == ""
    assert where in " ".join(run(MODEL_PATH).output.split())


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch):
    """The command does not try again and again: it looks into the cache, and ends with one line."""
    asked = []

    def unreachable(name, timeout):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(loading, "model_info", unreachable)
    start = time.perf_counter()
    result = run("nosuch/dir", "--memory", "1GiB")

    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "cannot read the config of nosuch/dir" in result.output
    assert asked == ["nosuch/dir"]
    assert time.perf_counter() - start < 5


def test_a_home_that_nobody_has():
    """Is no place for a model or a trace, in one line."""
    plain = run("~nobodyknows/x", "--memory", "1GiB")
    traced = run(MODEL_PATH, "--memory", "1GiB", "--trace", "~nobodyknows/x.csv")

    assert (plain.exit_code, traced.exit_code) == (1, 1)
    assert "there is no ~nobodyknows/x: give a folder" in plain.output
    assert "there is no trace ~nobodyknows/x.csv" in traced.output


def test_configs_that_are_not_there(tmp_path, monkeypatch):
    """A file, a folder without config, a file that is no config, an id without network: each is said."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken.json"
    broken.write_text('{"model_type": "no-such-type"}')
    said = [
        run(where, "--memory", "1GiB").output for where in (tmp_path / "x.json", tmp_path, broken, "nobody/nothing")
    ]

    assert "there is no " in said[0]
    assert "has no config.json" in said[1]
    assert "transformers does not understand it" in said[2]
    assert "in its cache" in said[3]


def test_a_config_is_left_as_it_was():
    """Planning changes nothing in the config that it is given."""
    config = config_of(published.GPT_OSS_20B)
    before = config.to_dict()
    plan(config, memory="40GiB")

    assert config.to_dict() == before
