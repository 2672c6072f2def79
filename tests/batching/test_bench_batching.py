"""The benchmark of batching runs, finds wrong tokens, and counts what it says it counts."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from paged_cache.bench.workload import Workload, make_workload

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHARED = ("batching", "roofline")


@pytest.fixture
def parts(monkeypatch):
    """Imports a module of the benchmark's folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield lambda name: importlib.import_module(f"batching.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] in SHARED]:
        del sys.modules[name]


@pytest.fixture
def run(parts, tmp_path):
    """Runs the script in this process; what it wrote."""

    def run(*arguments):
        output, threads = tmp_path / "batching.json", torch.get_num_threads()
        try:
            script = runpy.run_path(str(BENCHMARKS / "bench_batching.py"))
            script["main"]([*arguments, "--threads", "1", "--output", str(output)])
        finally:
            torch.set_num_threads(threads)
        return json.loads(output.read_text(encoding="utf-8"))

    return run


def served(outcome, rows, seconds=1.0):
    """A run in which everybody got tokens, evenly over time."""
    requests = [outcome.Served(row, seconds / len(row), seconds) for row in rows]
    return outcome.Run(seconds, requests, 100)


class Fake:
    """A candidate that always gives the same tokens."""

    def __init__(self, name, result):
        self.name, self.result = name, result

    def run(self, workload):
        return self.result


def test_everybody_serves_all_requests(run, parts):
    """All candidates give the loop's tokens, ours hit the shared prefix, and rounds of a second call are added."""
    others = ("loop", "padded", *parts("peers").GENERATE_BATCH)
    run("--quick", "--shared", "64")
    result = run("--quick", "--shared", "64", "--add")

    (line,) = result["workloads"]
    assert len(line["rounds"]) == 2
    for found in line["rounds"]:
        assert found.keys() == {*others, "fcfs", "sjf"}
        for metrics in found.values():
            assert metrics["num_equal"] == 8
            assert 0 < metrics["ttft_mean"] <= metrics["latency_mean"] <= metrics["latency_p99"] <= metrics["seconds"]
        for name in ("fcfs", "sjf"):
            assert found[name]["prefix_hits"] == 7 * 64
            assert found[name]["kv_bytes"] < found["padded"]["kv_bytes"]
    assert line["tokens_per_second"].keys() == {f"{ours} / {other}" for ours in ("fcfs", "sjf") for other in others}


def test_rounds_of_other_settings_are_not_mixed(run):
    """Adding to a file that was measured with another number of requests is refused."""
    run("--quick", "--shared", "0", "--only", "sjf")

    with pytest.raises(SystemExit, match="other settings"):
        run("--quick", "--shared", "0", "--only", "fcfs", "--add")


def test_wrong_tokens_get_no_times(parts):
    """A peer with other tokens is left out, ours end the benchmark, and in 16 bits both are only counted."""
    measuring, outcome = (parts(name) for name in ("measuring", "outcome"))
    task = Workload([[1], [2]], [2, 2])
    right, wrong = served(outcome, [[1, 2], [3, 4]]), served(outcome, [[1, 2], [3, 5]])
    play = lambda who, is_exact: measuring.play(who, task, is_exact, False, lambda name: None)  # noqa: E731
    peer, ours = Fake("padded", wrong), Fake("sjf", wrong)
    reference = Fake("loop", right)

    found = play([reference, peer, Fake("fcfs", right)], True)
    assert found["padded"] == {"num_equal": 1}
    assert found["fcfs"]["tokens_per_second"] == 4
    with pytest.raises(measuring.WrongTokensError, match="sjf: request 1 differs at its token 1: 5 instead of 4"):
        play([reference, ours], True)
    assert play([reference, ours], False)["sjf"]["seconds"] == 1


def test_times_are_those_of_the_definitions(parts):
    """TPOT leaves the first token out; percentiles and ratios are those of the numbers."""
    measuring, outcome, report = (parts(name) for name in ("measuring", "outcome", "report"))
    request = outcome.Served([1, 2, 3, 4, 5], 1.0, 3.0)
    rounds = [
        {
            "loop": {"num_equal": 1, "seconds": 4, "tokens_per_second": 1.0},
            "sjf": {"num_equal": 1, "seconds": 1, "tokens_per_second": x},
        }
        for x in (4.0, 6.0, 5.0)
    ]
    comparison = measuring.Comparison("", 0, 1, {"loop": {}, "sjf": {}}, rounds)

    assert request.tpot == 0.5
    assert outcome.percentile([float(i) for i in range(101)], 99) == 99
    assert comparison.ratio("sjf", "loop") == measuring.Spread(5.0, 4.0, 6.0)
    assert report.ratios(comparison) == ["sjf against loop x5.00 [4.00, 6.00] (goal 5: met)"]


def test_requests_are_those_of_the_trace():
    """Lengths are the trace's divided by the factor; shared tokens come on top, and all prompts begin with them."""
    workload = make_workload(300, 2, 50, num_shared=10, seed=0)

    assert [len(prompt) - 10 for prompt in workload.prompts[:3]] == [187, 198, 440]
    assert workload.num_new[:3] == [22, 54, 28]
    assert workload.num_new[256:] == workload.num_new[:44]
    assert len({tuple(prompt[:10]) for prompt in workload.prompts}) == 1
    assert len({tuple(prompt) for prompt in workload.prompts}) == 300


def test_parts_of_a_step_are_all_of_it(run):
    """The profile names the model's and the batcher's parts, and their share adds up."""
    profiles = run("--quick", "--profile", "2")["profiles"]

    for profile in profiles:
        parts = profile["milliseconds"]
        assert {"linear layers", "attention", "choosing tokens", "scheduling"} <= parts.keys()
        assert all(value >= 0 for value in parts.values())
        assert 0 < profile["bookkeeping"] < 100


def test_the_long_run_comes_to_an_end(run):
    """Requests in a pool that is too small, some cancelled, end once each, with generate's tokens, and give all blocks back."""
    result = run("--quick", "--soak", "150")

    assert not result["problems"]
    assert sum(result["reasons"].values()) == 150
    assert result["reasons"]["abort"] > 0
    assert result["num_preemptions"] > 0
    assert result["num_compared"] > 0
