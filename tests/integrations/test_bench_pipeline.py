"""The benchmark of pipelines runs, and finds outputs that are not those of the unwrapped one."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHARED = ("batching", "roofline")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def script(monkeypatch):
    """The benchmark's names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield runpy.run_path(str(BENCHMARKS / "bench_pipeline.py"))
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.partition(".")[0] in SHARED]:
        del sys.modules[name]


def test_everybody_serves_all_prompts(script, tmp_path):
    """All candidates have times, ours has the reference's records, and answers have lengths of their own."""
    output = tmp_path / "pipeline.json"
    script["main"](["--quick", "--threads", "1", "--output", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))

    (one,) = result["rounds"]
    assert one.keys() == {"batch_size=1", "batch_size=8", "batch_size=32", "paged"}
    assert one["paged"]["equal"] == one["batch_size=1"]["equal"] == 8
    assert all(line["seconds"] > 0 for line in one.values())
    assert result["ratios"].keys() == one.keys() - {"paged"}
    assert 16 < result["tokens"] < 2 * 8 * 12


def test_wrong_records_are_found(script):
    """Whoever gives other records is counted, and if that is the paged pipeline the benchmark ends."""
    who = {"batch_size=1": lambda prompts: [[1], [2]], "paged": lambda prompts: [[1], [3]]}
    found = script["play"](who, ["a", "b"], False, lambda: None)

    assert found["paged"]["equal"] == 1
    with pytest.raises(SystemExit, match="paged: 1 of 2 records"):
        script["require_equal"](found, 2, True)
    assert script["require_equal"](found, 2, False) is found


def test_ratios_are_those_of_a_round(script):
    """Twice as fast in every round is twice as fast, however long rounds take."""
    rounds = [
        {"batch_size=1": {"seconds": 2 * time, "equal": 1}, "paged": {"seconds": time, "equal": 1}} for time in (1, 9)
    ]
    ratio = script["ratios"](rounds)["batch_size=1"]

    assert (ratio.min, ratio.median, ratio.max) == (2, 2, 2)
    assert "2.00 [2.00, 2.00]" in script["table"](rounds, 1)


def test_prompts_have_the_lengths_of_the_trace(script):
    """Pieces of one text, from the same seed the same ones."""
    tokenizer = script["AutoTokenizer"].from_pretrained(script["MODEL_PATH"])
    prompts = script["make_prompts"](tokenizer, 20, 10.0, seed=1)
    lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]

    assert (
        prompts
        == script["make_prompts"](tokenizer, 20, 10.0, seed=1)
        != script["make_prompts"](tokenizer, 20, 10.0, seed=2)
    )
    assert lengths[0] == pytest.approx(37, abs=3)
    assert len(set(lengths)) > 10
