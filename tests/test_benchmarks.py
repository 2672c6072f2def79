"""What the benchmarks count must hold, and what they time must run and agree; times are for people."""

import collections
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TOLERANCE = 1e-4


def run(name, output, *arguments):
    """The JSON file of a benchmark that was run in this process."""
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCHMARKS / name))["main"]([*arguments, "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Slots of 256 requests, and a beam search."""
    output = tmp_path_factory.mktemp("benchmarks") / "memory.json"
    return run("bench_memory.py", output, "--batches", "32", "--beams", "8", "2048", "8")


def test_few_slots_are_unused(memory):
    """At block size 16 less than 4 % of what requests of a trace reserve is unused, at the end and on average."""
    paged, *padded = memory["slots"]

    assert memory["num_requests"] == 256
    assert paged["unused_percent"] < 4
    assert paged["life_unused_percent"] < 4
    assert all(row["used"] == paged["used"] and row["reserved"] > 2 * paged["reserved"] for row in padded)


def test_beams_share_their_prompt(memory):
    """Eight beams never hold more than 1.1 times one prompt and their own tokens, and find what they find without us."""
    beams = memory["beams"]

    assert (beams["num_beams"], beams["num_prompt"]) == (8, 2048)
    assert beams["ratio"] <= 1.1
    assert beams["is_identical"]


@pytest.fixture
def batching(monkeypatch):
    """The folder of the scripts is where they find the parts they share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "batching"]:
        del sys.modules[name]


@pytest.mark.usefixtures("batching")
def test_adapters_are_served_by_everybody(tmp_path):
    """For one adapter and for three everybody has the same tokens; rounds of a second call are added."""
    options = [tmp_path / "lora.json", "--quick", "--threads", "1"]
    result = run("bench_lora.py", *options)
    (times,) = result["rounds"]
    again = run("bench_lora.py", *options, "--only", "ours", "--add")

    several = {f"{name} {count}" for name in ("groups", "mixed", "ours") for count in (1, 3)}
    assert times.keys() == several | {"active 1", "base"}
    assert result["ratios"]["mixed 3 / ours 3"]["median"] == times["mixed 3"] / times["ours 3"]
    assert again["rounds"][0] == times
    assert again["rounds"][1].keys() == {"ours 1", "ours 3"}


@pytest.mark.usefixtures("batching")
def test_goals_of_adapters():
    """They are judged by ratios of single rounds, where eight adapters were measured."""
    script = runpy.run_path(str(BENCHMARKS / "bench_lora.py"))
    rounds = [{"ours 1": one, "ours 8": 1.2 * one, "mixed 8": 1.9 * one} for one in (1.0, 3.0, 2.0)]
    found = script["ratios"](rounds)

    assert found["ours 8 / ours 1"].median == pytest.approx(1.2)
    assert list(script["verdicts"](found).values()) == [True, False]
    assert not script["verdicts"](script["ratios"]([{"ours 1": 1.0, "ours 3": 1.0}]))


def test_requests_are_served_in_pools(tmp_path):
    """Pools hold what the requests need at a time and no more, and tables are made of runs."""
    result = run("bench_allocation.py", tmp_path / "allocation.json", "--quick", "--slots", "8")
    plain, caching = result["pools"]

    assert result["num_requests"] == 48
    assert (plain["prefix_caching"], caching["prefix_caching"]) == (False, True)
    assert plain["num_allocated"] == caching["num_allocated"] > result["needed"]
    assert plain["blocks_per_table"] == caching["blocks_per_table"]
    for pool in result["pools"]:
        assert result["needed"] == pool["peak"] <= pool["highest"] <= pool["num_blocks"] <= 1.15 * pool["peak"]
        assert 1 <= pool["blocks_per_run"] <= pool["blocks_per_table"]
        assert pool["extend_us"] > 0


def test_requests_come_in_turn():
    """The trace, then the same requests in another order; each gets a slot and, but for its last token, all it asks for."""
    script = runpy.run_path(str(BENCHMARKS / "bench_allocation.py"))
    requests = script["read_requests"](600, seed=0)
    steps = list(script["steps"](requests, 16))
    served = collections.Counter()
    for step in steps:
        served.update(step)

    assert requests[0] == (374, 44)
    assert sorted(requests[:256]) == sorted(requests[256:512])
    assert requests[:256] != requests[256:512]
    assert set(requests[512:]) <= set(requests[:256])
    assert max(map(len, steps)) == 16
    assert list(served.items()) == list(enumerate(prompt + output - 1 for prompt, output in requests))
    assert [script["count_runs"](table) for table in ([5], [1, 2, 3], [3, 2, 1], [4, 5, 9, 10, 3])] == [1, 1, 3, 3]
