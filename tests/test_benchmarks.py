"""What the benchmarks count must hold, and what they time must run and agree; times are for people."""

import collections
import dataclasses
import functools
import importlib
import json
import runpy
import sys
import types
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


def test_decode_steps_agree(tmp_path):
    """The timed steps give the same outputs with both caches."""
    result = run("bench_decode_step.py", tmp_path / "decode_step.json", "--quick")

    assert result["lines"]
    assert all(line["worst_difference"] < TOLERANCE and line["rounds"] > 0 for line in result["lines"])


@pytest.fixture
def batching(monkeypatch):
    """The folder of the scripts is where they find the parts they share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("batching", "roofline")]:
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


@pytest.fixture
def roofline(monkeypatch):
    """The folder of the scripts is where they find the parts they share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "roofline"]:
        del sys.modules[name]


@pytest.mark.usefixtures("roofline")
@pytest.mark.parametrize("extent", [1, 4, 16])
def test_blocks_lie_in_runs(extent):
    """A table has every block once, in runs around the extent's length, the same ones from the same seed."""
    problem, shapes = (importlib.import_module(f"roofline.{name}") for name in ("problem", "shapes"))
    shape = shapes.Shape("ragged", 9, 1024, 1, 1, 1, 8, "float32", block_size=4, first=(2047, 1), extent=extent)
    torch.manual_seed(0)
    table = problem.Problem(shape, "cpu", 1).block_table
    torch.manual_seed(0)
    same = problem.Problem(shape, "cpu", 1).block_table

    rows = [row[row >= 0] for row in table]
    length = shape.num_blocks / sum(1 + (row.diff() != 1).sum().item() for row in rows)
    assert torch.equal(table, same)
    assert [len(row) for row in rows] == [512] + 8 * [256]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(shape.num_blocks, dtype=torch.int32))
    assert length == pytest.approx(extent, rel=0.2)


@pytest.mark.usefixtures("roofline")
def test_lines_name_the_order_of_their_blocks():
    """The usual order goes without saying; files from before there was a choice had blocks in random order."""
    measuring, shapes = (importlib.import_module(f"roofline.{name}") for name in ("measuring", "shapes"))
    usual = shapes.Shape("decode", 8, 8192)
    names = [str(dataclasses.replace(usual, extent=extent)) for extent in (16, 1, 4)]
    line = measuring.Result(usual, 1, 1, 1, 1).to_json()
    old = line | {"shape": {name: value for name, value in line["shape"].items() if name != "extent"}}

    assert names == [f"decode bfloat16 32/8x128 b16 8 x 8192{end}" for end in ("", " scattered", " extent 4")]
    assert measuring.Result.from_json(line).shape == usual
    assert measuring.Result.from_json(old).shape.extent == 1


@pytest.mark.usefixtures("roofline")
def test_large_decode_lines_come_scattered_too():
    """The plain ones from 64 MiB of keys and values on, and nothing else about them is different."""
    shapes = importlib.import_module("roofline.shapes")
    lines = shapes.cpu_shapes(quick=False)
    large = [x for x in lines if x.section == "decode" and not x.kv_dtype and x.kv_bytes >= 64 * 2**20]

    assert len({str(line) for line in lines}) == len(lines)
    assert len(large) == 25
    assert [x for x in lines if x.section == "scattered"] == [
        dataclasses.replace(x, section="scattered", extent=1) for x in large
    ]
    assert {x.extent for x in lines if x.section != "scattered"} == {shapes.EXTENT} == {16}


@pytest.mark.usefixtures("roofline")
def test_goals_do_not_judge_scattered_lines(monkeypatch):
    """Both sections are measured against a plain read and show their share of it; only decode has to reach a goal."""
    candidates, goals, machines, measuring, report, shapes = (
        importlib.import_module(f"roofline.{name}")
        for name in ("candidates", "goals", "machines", "measuring", "report", "shapes")
    )
    monkeypatch.setattr(measuring, "MEMORY_BOUND", 0)
    for module in (candidates, measuring):
        monkeypatch.setattr(module, "FAR_BYTES", 2**20)
    monkeypatch.setattr(measuring, "refusal", lambda problem: None)
    usual = shapes.Shape("decode", 2, 256, 1, 4, 2, 64, "float32")
    lines = [usual, dataclasses.replace(usual, section="scattered", extent=1)]
    results = [measuring.measure(machines.Rehearsal(), line, [], 0.0, 2**30) for line in lines]
    verdicts = goals.judge("cpu", results, machines.Ceilings(1.0, 1.0, 1.0, {}))

    for result in results:
        assert {"sdpa", "read"} <= result.ratios.keys()
        assert f" {100 * result.ratios['read'].median:3.0f} % " in report.row(result, 1e9)
    assert [goal.must for goal in verdicts] == [0.9, 0.7]
    assert [list(goal.values) for goal in verdicts] == 2 * [[str(usual)]]


@pytest.mark.usefixtures("roofline")
def test_kernels_are_timed_on_the_cpu(tmp_path):
    """Every kind of line has times for us and all peers, right answers, a goal that speaks of it, and a picture."""
    pytest.importorskip("numba")
    lines = r"(decode|prefill|chunk) .*(float32) .*(1 x 128|1 x 512)"
    result = run("bench_kernels.py", tmp_path / "k.json", "--device", "cpu", "--quick", "--filter", lines, "--plot")

    sections = {line["shape"]["section"]: line for line in result["lines"]}
    assert sections.keys() == {"decode", "prefill", "chunk"}
    assert sections["decode"]["times"].keys() == {"paged", "sdpa", "write+paged", "dynamic"}
    assert sections["decode"]["ratios"].keys() == {"sdpa", "dynamic"}
    assert sections["chunk"]["times"].keys() == {"paged", "sdpa", "gather+sdpa"}
    assert not any(line["missing"] for line in result["lines"])
    assert all(0 < error < TOLERANCE for line in result["lines"] for error in line["errors"].values())
    assert "decode, speed over SDPA on dense K/V, at least 0.9" in {goal["goal"] for goal in result["goals"]}
    assert min(result["ceilings"]["gflops"].values()) > 0
    assert (tmp_path / "k.png").stat().st_size > 10_000


@pytest.mark.usefixtures("roofline")
def test_the_protocol_for_gpus_is_rehearsed(tmp_path, monkeypatch):
    """All lines go through layers in turn, poisoned outputs, variants of ours and the goals of a GPU."""
    pytest.importorskip("numba")
    # What the CPU's kernel leaves to the reference is not worth timing, but has to run on a GPU.
    monkeypatch.setattr(importlib.import_module("roofline.measuring"), "refusal", lambda problem: None)
    options = ["--device", "cuda", "--rehearse", "--seconds", "0.001", "--ablate", "kernels.cpu.attention.MAX_ROWS=1"]
    result = run("bench_kernels.py", tmp_path / "k.json", *options)

    shapes = importlib.import_module("roofline.shapes").cuda_shapes(quick=False)
    assert len(result["lines"]) == len(shapes)
    for line in result["lines"]:
        assert not line["missing"]
        assert {"paged", "paged MAX_ROWS=1", "sdpa"} <= line["times"].keys()
        assert line["eager"].keys() == line["times"].keys()
        assert line["rounds"] >= 5
        assert all(0 < error < 2e-2 for error in line["errors"].values())
    assert max(line["num_layers"] for line in result["lines"]) > 1
    assert any(goal["goal"].startswith("window") for goal in result["goals"])


@pytest.mark.usefixtures("roofline")
def test_wrong_answers_get_no_times(monkeypatch):
    """Who writes too little, or something else, is left out with the reason; the others are timed all the same."""
    candidates, machines, measuring, shapes = (
        importlib.import_module(f"roofline.{name}") for name in ("candidates", "machines", "measuring", "shapes")
    )
    shape = shapes.Shape("verify", 2, 32, 2, 4, 2, 64, "float32")
    right = candidates.sdpa

    def forgetful(problem):
        return lambda layer: torch.empty(2, 2, 4, 64)

    def inexact(problem):
        return lambda layer: [1.01 * part for part in right(problem)(layer)]

    makers = {"paged": right, "forgetful": forgetful, "inexact": inexact, "broken": lambda problem: 1 / 0}
    made = lambda problem, _: {name: functools.partial(make, problem) for name, make in makers.items()}  # noqa: E731
    monkeypatch.setattr(measuring, "candidates", made)
    monkeypatch.setattr(measuring, "refusal", lambda problem: None)
    result = measuring.measure(machines.Rehearsal(), shape, [], 0.0, 2**30)

    assert result.times.keys() == {"paged"}
    assert result.missing.keys() == {"forgetful", "inexact", "broken"}
    assert result.missing["broken"].startswith("ZeroDivisionError")
    assert all(result.missing[name].startswith("WRONG") for name in ("forgetful", "inexact"))


@pytest.mark.usefixtures("roofline")
@pytest.mark.parametrize("is_old", [False, True])
def test_varlen_is_called_as_its_version_wants(monkeypatch, is_old):
    """torch's varlen attention, which runs on CUDA only, gets packed rows and the options that it has."""
    candidates, problem, shapes = (
        importlib.import_module(f"roofline.{name}") for name in ("candidates", "problem", "shapes")
    )
    task = problem.Problem(shapes.Shape("verify", 3, 32, 4, 4, 2, 64, "float32"), "cpu", 2)

    def attend(query, key, value, starts_q, starts_k, max_q, max_k, scale):
        assert (starts_q.tolist(), starts_k.tolist(), max_q, max_k) == ([0, 4, 8, 12], [0, 32, 64, 96], 4, 32)
        rows = [x.unflatten(0, (3, -1)).transpose(1, 2) for x in (query, key, value)]
        mask = torch.ones(4, 32, dtype=torch.bool).tril(28)
        out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def old(query, key, value, starts_q, starts_k, max_q, max_k, is_causal=False, scale=None):
        assert is_causal
        return attend(query, key, value, starts_q, starts_k, max_q, max_k, scale)

    def new(query, key, value, starts_q, starts_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        assert window_size == (-1, 0)
        return attend(query, key, value, starts_q, starts_k, max_q, max_k, scale)

    module = types.SimpleNamespace(varlen_attn=old if is_old else new)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)

    assert task.error(candidates.varlen(task)(1), 1) < 1e-5
