"""Everybody serves the same requests, wrong tokens are found, and numbers are those of their definitions."""

import math
import runpy
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import ContinuousBatchingConfig
from typer.testing import CliRunner

from paged_cache.bench.measuring import WrongAnswerError, measure
from paged_cache.bench.results import Results
from paged_cache.bench.serving import comparing, throughput
from paged_cache.bench.serving.arrivals import make_pace
from paged_cache.bench.serving.comparing import Settings
from paged_cache.bench.serving.datasets import Dataset
from paged_cache.bench.serving.metrics import (
    Wanted,
    latencies,
    max_concurrent,
    num_good,
    percentile,
    serve_metrics,
    throughput_metrics,
)
from paged_cache.bench.serving.outcome import Run, Served
from paged_cache.bench.serving.peers import GENERATE_BATCH, GenerateBatch
from paged_cache.bench.workload import Workload, make_workload
from paged_cache.cli import app
from paged_cache.errors import InvalidRequestError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OTHERS = ("loop", "padded", *GENERATE_BATCH)


@pytest.fixture
def bench(tmp_path):
    """Runs `paged-cache bench` in this process; what it wrote."""

    def run(*arguments):
        path = tmp_path / "results.json"
        command = ["bench", *arguments, "--threads", "1", "--output-json", str(path)]
        result = CliRunner().invoke(app, command, env={"COLUMNS": "120"}, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return Results.load(path)

    return run


def served(rows, seconds=1.0):
    """A run in which everybody got tokens, evenly over time."""
    requests = [Served(row, [seconds * (i + 1) / len(row) for i in range(len(row))]) for row in rows]
    return Run(seconds, requests, 100)


class Fake:
    """A server that always gives the same tokens."""

    def __init__(self, name, result):
        self.name, self.result, self.num_runs = name, result, 0

    def describe(self):
        return {}

    def serve(self, workload, pace=None):
        self.num_runs += 1
        return self.result


def test_everybody_serves_all_requests(bench):
    """All candidates give the loop's tokens, ours hit the shared prefix, and rounds of a second call are added."""
    options = ["throughput", "--quick", "--shared-prefix-len", "64"]
    bench(*options)
    results = bench(*options, "--add")

    assert results.cases() == [{"shared_prefix_len": 64}]
    assert results.candidates() == [*OTHERS, "fcfs", "sjf", "prepacked"]
    assert results.ours == ["fcfs", "sjf", "prepacked"]
    for line in results.lines:
        found = {metric: min(samples) for metric, samples in line.metrics.items()}
        assert not line.note
        assert {len(samples) for samples in line.metrics.values()} == {2}
        assert found["num_equal"] == found["num_requests"] == 8
        assert 0 < found["mean_ttft_ms"] <= found["mean_e2el_ms"] <= found["p99_e2el_ms"]
        assert found["p99_e2el_ms"] <= 1e3 * found["elapsed_time"]
        assert found["total_num_tokens"] > 8 * 64
    padded = results.line({"shared_prefix_len": 64}, "padded")
    for name in results.ours:
        metrics = results.line({"shared_prefix_len": 64}, name).metrics
        assert metrics["cached_tokens"] == [7 * 64] * 2
        for metric in ("kv_allocated_bytes", "peak_kv_in_use_bytes"):
            assert metrics[metric][0] < padded.metrics[metric][0]


@pytest.mark.skipif(not GENERATE_BATCH, reason="transformers has no generate_batch of this kind")
def test_pages_in_use_are_those_of_requests():
    """Two requests at once, each within a page: two pages of K and V in use, whatever the cache has; a shared page is one."""
    model = comparing.models.make_model("tiny")
    page = 32 * comparing.models.kv_bytes_per_token(model)
    apart = Workload([[1] * 10, [2] * 12], [4, 4])
    together = Workload([[3] * 40, [3] * 40], [2, 2])
    with torch.no_grad():
        first, second = (GenerateBatch(model, page_size=32).serve(load) for load in (apart, together))

    assert first.kv_in_use == 2 * page
    assert first.kv_allocated > 2 * first.kv_in_use
    assert second.kv_in_use in (3 * page, 4 * page)  # the first page is one where both came one after the other


def test_memory_that_nobody_tells_has_no_number():
    """vLLM says what it allocates only."""
    found = throughput_metrics(served([[1, 2]]), Workload([[1]], [2]))

    assert found["kv_allocated_bytes"] == 100
    assert "peak_kv_in_use_bytes" not in found


def test_requests_over_time(bench):
    """Everybody gets the same arrivals and gives the loop's tokens; nobody is through before the last request came."""
    results = bench(
        "serve", "--quick", "--request-rate", "40", "--goodput", "ttft:60000", "--metric-percentiles", "50,99"
    )

    (case,) = results.cases()
    assert (case["request_rate"], case["burstiness"]) == (40, 1)
    assert results.candidates() == ["loop", *GENERATE_BATCH, "fcfs", "sjf", "hrrn", "prepacked"]
    assert results.details["arrivals"][-1] == pytest.approx(8 / 40)
    for line in results.lines:
        found = {metric: samples[0] for metric, samples in line.metrics.items()}
        assert not line.note
        assert found["num_equal"] == found["completed"] == 8
        assert found["duration"] > 8 / 40
        assert found["request_goodput"] == found["request_throughput"] == pytest.approx(8 / found["duration"])
        assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] < found["p99_e2el_ms"]
        assert 1 <= found["max_concurrent_requests"] <= 8


@pytest.mark.parametrize("name", ["loop", *GENERATE_BATCH, "sjf"])
def test_no_more_than_allowed_are_under_way(name):
    """Two at a time: a request that has to wait arrives when it is let in, and never more than two are served."""
    model = comparing.models.make_model("tiny")
    workload = make_workload(6, 20, 256, 0, 0)
    with torch.no_grad(), comparing.servers(Settings("tiny"), [name], model, [workload]) as (server,):
        run = server.serve(workload, make_pace(6, max_concurrency=2))

    arrivals = [request.arrival for request in run.requests]
    assert arrivals[:2] == [0, 0]
    assert all(arrival > 0 for arrival in arrivals[2:])
    assert max_concurrent(run.requests) <= 2
    assert run.tokens == comparing.Loop(model).serve(workload).tokens


def test_rounds_of_other_settings_are_not_mixed(bench, tmp_path):
    """Adding to a file of another number of requests is refused before anything is measured; the file stays."""
    options = ["throughput", "--quick", "--shared-prefix-len", "0", "--only", "sjf"]
    before = bench(*options)
    path = tmp_path / "results.json"
    more = ["bench", *options, "--threads", "1", "--num-prompts", "9", "--add", "--output-json", str(path)]
    result = CliRunner().invoke(app, more)

    assert result.exit_code == 1
    assert "num_prompts" in result.output
    assert "measuring" not in result.output
    assert Results.load(path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["throughput", "--dataset-name", "nope"], "dataset_name 'nope'"),
        (["throughput", "--dataset-name", "sharegpt"], "sharegpt is read from a file: give --dataset-path FILE"),
        (["serve", "--dataset-name", "custom", "--dataset-path", "no.jsonl"], "dataset_path no.jsonl does not exist"),
        (
            ["throughput", "--random-input-len", "7"],
            "random_input_len is an option of random, and dataset_name is trace",
        ),
        (["throughput", "--dataset-name", "random", "--factor", "3"], "factor is an option of trace"),
        (["serve", "--skip-chat-template"], "skip_chat_template is an option of custom"),
        (["serve", "--dataset-path", "x.json"], "dataset_path is an option of sharegpt and custom"),
        (
            ["serve", "--prefix-repetition-num-prefixes", "3"],
            "prefix_repetition_num_prefixes is an option of prefix_rep",
        ),
        (["throughput", "--quick", "--factor", "0"], "factor is 0"),
        (["throughput", "--factor", "nan"], "factor is nan"),
        (["throughput", "--room", "0"], "room is 0"),
        (["serve", "--room", "-1"], "room is -1"),
        (["serve", "--goodput", "ttft:nan"], "goodput 'ttft:nan'"),
        (["throughput", "--only", "nope"], "no candidate 'nope'"),
        (["throughput", "--peer", "nope"], "no peer 'nope'"),
        (["throughput", "--dtype", "int8"], "dtype is 'int8'"),
        (["throughput", "--dataset-name", "random", "--random-input-len", "20000"], "20384 tokens"),
        (["throughput", "--factor", "-1"], "factor is -1"),
        (["serve", "--request-rate", "0"], "request_rate is 0"),
        (["serve", "--goodput", "itl:3"], "goodput 'itl:3'"),
        (["serve", "--metric-percentiles", "high"], "metric_percentiles 'high'"),
        (["serve", "--percentile-metrics", "ttft,speed"], "['speed']"),
    ],
)
def test_wrong_options_end_in_one_line(options, message):
    """The line names the value; nothing was measured."""
    result = CliRunner().invoke(app, ["bench", *options, "--model", "tiny"], catch_exceptions=False)

    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1


def test_wrong_tokens_get_no_times():
    """A peer with other tokens is left out, ours end the benchmark, and in 16 bits both are only counted."""
    task = Workload([[1], [2]], [2, 2])
    right, wrong = served([[1, 2], [3, 4]]), served([[1, 2], [3, 5]])
    peer, ours, reference = Fake("padded", wrong), Fake("sjf", wrong), Fake("loop", right)

    def compare(who, dtype="float32"):
        settings = Settings("tiny", dtype=dtype, rounds=2)
        lines = comparing.compare(who, {}, task, None, throughput_metrics, settings, lambda name: None)
        return {line.candidate: line for line in lines}

    found = compare([reference, peer, Fake("fcfs", right)])
    assert found["fcfs"].metrics["output_throughput"] == [4, 4]
    assert not found["padded"].metrics
    assert found["padded"].note == "WRONG: request 1 differs at its token 1: 5 instead of 4; 1 of 2 requests in all"
    assert peer.num_runs == 1  # it does not come to the rounds that are timed
    with pytest.raises(WrongAnswerError, match="sjf: request 1 differs at its token 1: 5 instead of 4"):
        compare([reference, ours])
    assert compare([reference, ours], "bfloat16")["sjf"].metrics["num_equal"] == [1, 1]


@pytest.mark.parametrize("command", ["throughput", "serve"])
def test_ours_alone_is_checked_by_a_loop(bench, monkeypatch, command):
    """Without a peer, all tokens are those of a loop that has no times; the title says so, and wrong ones are found."""
    options = ["--quick", "--only", "fcfs,sjf", *(["--shared-prefix-len", "0"] if command == "throughput" else [])]
    results = bench(command, *options)
    right = comparing.Ours.serve

    def wrong(self, workload, pace=None):
        run = right(self, workload, pace)
        run.requests[-1].tokens[-1] += 1
        return run

    monkeypatch.setattr(comparing.Ours, "serve", wrong)
    done = CliRunner().invoke(app, ["bench", command, *options, "--threads", "1"])

    assert results.candidates() == ["fcfs", "sjf"]
    assert "tokens are those of a loop that was not timed" in results.title
    assert {line.metrics["num_equal"][0] for line in results.lines} == {8}
    assert done.exit_code == 1
    assert "fcfs: request 7 differs" in done.output
    assert comparing.checked_by(Settings(dtype="bfloat16"), ["sjf", "loop"]).endswith("those of sjf only")
    assert not comparing.checked_by(Settings(), ["loop", "sjf"])


@pytest.mark.skipif(not GENERATE_BATCH, reason="this version of transformers is not measured")
def test_limits_for_a_cpu_are_for_a_cpu():
    """On CUDA transformers' batching has its own settings, on a CPU those that are fastest there."""
    cpu, cuda = (GenerateBatch(SimpleNamespace(device=torch.device(kind))) for kind in ("cpu", "cuda"))
    workload = Workload([[1, 2]], [2])

    assert cuda._settings(workload) == ContinuousBatchingConfig()
    assert cuda.describe() == {"settings": "transformers' own"}
    assert cpu._settings(workload).max_batch_tokens == cpu.describe()["max_tokens"] == 256
    assert not cpu._settings(workload).auto_switch_to_flash


def test_wrong_numbers_of_tokens_are_found():
    """An answer that is too short is wrong, although all that is there is right."""
    task = comparing.Task(Fake("sjf", served([[1]])), Workload([[1]], [2]), None, throughput_metrics, comparing.Judge())
    loop = comparing.Task(Fake("loop", served([[1, 2]])), Workload([[1]], [2]), None, throughput_metrics, task.judge)

    with pytest.raises(WrongAnswerError, match="has 1 tokens instead of 2"):
        measure([loop, task], ["sjf"], {}, check=comparing.same_tokens)


def test_times_are_those_of_the_definitions():
    """TTFT from arrival, TPOT without the first token, ITL every gap, E2EL to the last token; single tokens have no TPOT."""
    first = Served([1, 2, 3], [2.0, 2.5, 4.0], arrival=1.0)
    second = Served([1], [6.0], arrival=3.0)
    found = latencies([first, second], Wanted(percentiles=(50.0, 99.9)))

    assert (found["mean_ttft_ms"], found["mean_tpot_ms"], found["mean_itl_ms"]) == (2000, 1000, 1000)
    assert (found["mean_e2el_ms"], found["median_e2el_ms"], found["std_ttft_ms"]) == (3000, 3000, 1000)
    assert found["p50_ttft_ms"] == 2000
    assert found["p99.9_itl_ms"] == pytest.approx(1499)
    assert latencies([second], Wanted(("itl", "tpot")))["p99_itl_ms"] == 0
    assert percentile([float(i) for i in range(101)], 99) == 99
    assert percentile([5.0], 99) == 5
    assert max_concurrent([first, second]) == 2


def test_keys_are_those_of_vllm():
    """Whoever reads results of `vllm bench` finds its names here."""
    workload, run = Workload([[1, 2], [3]], [2, 2]), served([[1, 2], [3, 4]], 2.0)
    whole = throughput_metrics(run, workload)
    wanted = Wanted.parse("ttft,e2el", "90", ["ttft:1000", "e2el:1500"])
    online = serve_metrics(run, workload, wanted)

    assert (whole["elapsed_time"], whole["num_requests"], whole["total_num_tokens"]) == (2, 2, 7)
    assert (whole["requests_per_second"], whole["tokens_per_second"]) == (1, 3.5)
    assert (online["completed"], online["total_input_tokens"], online["total_output_tokens"]) == (2, 3, 4)
    assert (online["request_throughput"], online["output_throughput"]) == (1, 2)
    assert (online["total_token_throughput"], online["request_goodput"], online["duration"]) == (3.5, 0, 2)
    assert {name for name in online if name.startswith("p90")} == {"p90_ttft_ms", "p90_e2el_ms"}


def test_good_requests_meet_all_objectives():
    """A request counts if none of its objectives, in milliseconds, is missed; a limit that is just met is met."""
    quick, slow = Served([1, 2], [0.1, 0.2]), Served([1, 2], [0.1, 0.9])
    requests = [quick, slow, quick]

    assert num_good(requests, {"ttft": 100}) == 3
    assert num_good(requests, {"ttft": 100, "tpot": 200}) == 2
    assert num_good(requests, {"e2el": 900, "tpot": 800.1}) == 3
    assert num_good(requests, {"ttft": 99}) == 0


@pytest.mark.parametrize(("burstiness", "deviation"), [(1.0, 1.0), (0.25, 2.0), (16.0, 0.25)])
def test_arrivals_have_their_rate_and_spread(burstiness, deviation):
    """20,000 requests take as long as the rate says, and gaps vary as a gamma distribution's: by 1 / sqrt(burstiness)."""
    pace = make_pace(20_000, 50, burstiness, seed=3)
    gaps = [b - a for a, b in zip([0.0, *pace.arrivals], pace.arrivals, strict=False)]

    assert pace.arrivals == sorted(pace.arrivals)
    assert pace.arrivals[-1] == pytest.approx(400)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(deviation, rel=0.05)
    assert make_pace(20_000, 50, burstiness, seed=3) == pace
    assert make_pace(3, math.inf).arrivals == [0, 0, 0]


def test_requests_are_those_of_the_trace():
    """Lengths are the trace's divided by the factor; shared tokens come on top, and all prompts begin with them."""
    workload = make_workload(300, 2, 50, num_shared=10, seed=0)

    assert [len(prompt) - 10 for prompt in workload.prompts[:3]] == [187, 198, 440]
    assert workload.num_new[:3] == [22, 54, 28]
    assert workload.num_new[256:] == workload.num_new[:44]
    assert len({tuple(prompt[:10]) for prompt in workload.prompts}) == 1
    assert len({tuple(prompt) for prompt in workload.prompts}) == 300


def test_goals_speak_of_what_was_measured():
    """Each of ours has a goal for every peer and case; vLLM's has a stretch; other lengths have none."""
    goals = throughput.goals(Settings("28m"), Dataset(), (0, 256), ["loop", "padded", "generate_batch", "sjf", "vllm"])
    limits = {(goal.peer, goal.case.get("shared_prefix_len"), goal.limit, goal.is_stretch) for goal in goals}

    assert limits == {
        *[("loop", shared, 5.0, False) for shared in (0, 256)],
        *[("padded", shared, 3.0, False) for shared in (0, 256)],
        ("generate_batch", 0, 2.5, False),
        ("generate_batch", 256, 3.5, False),
        ("vllm", None, 1.8, False),
        ("vllm", None, 1.0, True),
    }
    assert not throughput.goals(Settings("28m"), Dataset("random"), (0,), ["loop", "sjf"])
    assert not throughput.goals(Settings("tiny"), Dataset(), (0,), ["loop", "sjf"])


def test_prepacked_weights_are_compared_where_they_can_be():
    """In float32 on a CPU, with vLLM's goals for them; elsewhere nobody of this name can be chosen."""
    names = Settings("28m").chosen(throughput.USUAL, throughput.POSSIBLE)
    goals = throughput.goals(Settings("28m"), Dataset(), (0,), [*names, "vllm"])

    assert names[-1] == "prepacked"
    assert {goal.limit for goal in goals if (goal.ours, goal.peer) == ("prepacked", "vllm")} == {1.8, 1.0}
    for other in (Settings("28m", dtype="bfloat16"), Settings("28m", device="cuda")):
        assert "prepacked" not in other.chosen(throughput.USUAL, throughput.POSSIBLE)
        with pytest.raises(InvalidRequestError, match="no candidate 'prepacked' here"):
            replace(other, only=("prepacked",)).chosen(throughput.USUAL, throughput.POSSIBLE)


def test_a_short_request_is_no_error_and_a_long_one_is():
    """A request that fits the model's positions exactly is served; one that is longer is refused by its length."""
    model = comparing.models.make_model("tiny")
    fits = Workload([[1] * (comparing.models.MAX_POSITIONS - 2)], [2])

    with comparing.servers(Settings("tiny"), ["loop"], model, [fits]) as (server,):
        assert server.name == "loop"
    too_long = Workload([[1] * comparing.models.MAX_POSITIONS], [2])
    with (
        pytest.raises(InvalidRequestError, match=r"16386 tokens .* 16384 positions"),
        comparing.servers(Settings("tiny"), ["loop"], model, [too_long]),
    ):
        pass


@pytest.fixture
def script(tmp_path):
    """Runs a script of benchmarks/ in this process; what it wrote."""

    def run(name, *arguments):
        threads, path = torch.get_num_threads(), tmp_path / "script.json"
        try:
            options = [*arguments, "--threads", "1", "--output-json", str(path)]
            runpy.run_path(str(BENCHMARKS / name))["main"](options)
        finally:
            torch.set_num_threads(threads)
        return Results.load(path)

    return run


def test_parts_of_a_step_are_all_of_it(script):
    """The profile names the model's and the batcher's parts, and together they are the whole."""
    results = script("profile_batching.py", "--quick", "--sequences", "2")

    assert len(results.lines) == 2
    for line in results.lines:
        parts = {name: value for name, (value,) in line.metrics.items()}
        together, bookkeeping = parts.pop("together_ms"), parts.pop("bookkeeping_percent")
        assert {"linear_layers_ms", "attention_ms", "choosing_tokens_ms", "scheduling_ms"} <= parts.keys()
        assert all(value >= 0 for value in parts.values())
        assert sum(parts.values()) == pytest.approx(together)
        assert 0 < bookkeeping < 100


def test_the_long_run_comes_to_an_end(script):
    """Requests in a pool that is too small, some cancelled, end once each, with generate's tokens, and give all blocks back."""
    results = script("soak_batching.py", "--num-prompts", "150")

    (line,) = results.lines
    found = {name: value for name, (value,) in line.metrics.items()}
    assert not results.details["problems"]
    assert (
        sum(found[f"num_{reason}"] for reason in ("length", "abort", "timeout", "rejected") if f"num_{reason}" in found)
        == 150
    )
    assert found["num_problems"] == 0
    assert found["num_abort"] > 0
    assert found["num_preemptions"] > 0
    assert found["num_compared"] > 0
