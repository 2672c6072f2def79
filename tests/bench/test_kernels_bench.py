"""The shapes, tables and candidates of `bench kernels` are what it says they are; what it times must run and agree."""

import dataclasses
import functools
import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from paged_cache.bench.kernels import assembling, benchmark, candidates, goals, machines, measuring, problem, shapes
from paged_cache.bench.kernels.timing import Timing
from paged_cache.bench.results import Results
from paged_cache.cli import app
from paged_cache.memory import storage

pytestmark = pytest.mark.slow  # says nothing about the installed transformers

TOLERANCE = 1e-4
CEILINGS = machines.Ceilings(1.0, 1.0, 1.0, {"float32": 1.0})
SETTINGS = {"device": "cpu"}


def run(output, *options):
    """The results that a command wrote."""
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(app, ["bench", "kernels", *options, "--output-json", str(output)])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return Results.load(output)


def refused(*options):
    """What a command says that does not run."""
    done = CliRunner().invoke(app, ["bench", "kernels", *options])
    assert done.exit_code == 2
    return " ".join(done.output.replace("│", "").split())


@pytest.mark.parametrize("extent", [1, 4, 16])
def test_blocks_lie_in_runs(extent):
    """A table has every block once, in runs around the extent's length, the same ones from the same seed."""
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


def test_lines_name_the_order_of_their_blocks():
    """The usual order goes without saying; files from before there was a choice had blocks in random order."""
    usual = shapes.Shape("decode", 8, 8192)
    names = [str(dataclasses.replace(usual, extent=extent)) for extent in (16, 1, 4)]
    data = Timing(usual).to_json()
    old = data | {"shape": {name: value for name, value in data["shape"].items() if name != "extent"}}

    assert names == [f"decode bfloat16 32/8x128 b16 8 x 8192{end}" for end in ("", " scattered", " extent 4")]
    assert Timing.from_json(data, []).shape == usual
    assert Timing.from_json(old, []).shape.extent == 1


def test_large_decode_lines_come_scattered_too():
    """The plain ones from 64 MiB of keys and values on, and nothing else about them is different."""
    lines = shapes.cpu_shapes(quick=False)
    large = [x for x in lines if x.section == "decode" and not x.kv_dtype and x.kv_bytes >= 64 * 2**20]

    assert len({str(line) for line in lines}) == len(lines)
    assert len(large) == 25
    assert [x for x in lines if x.section == "scattered"] == [
        dataclasses.replace(x, section="scattered", extent=1) for x in large
    ]
    assert {x.extent for x in lines if x.section != "scattered"} == {shapes.EXTENT} == {16}


def test_goals_do_not_judge_scattered_lines(monkeypatch):
    """Both sections are measured against a plain read and show their share of it; only decode has to reach a goal."""
    monkeypatch.setattr(measuring, "MEMORY_BOUND", 0)
    for module in (candidates, measuring):
        monkeypatch.setattr(module, "FAR_BYTES", 2**20)
    monkeypatch.setattr(measuring, "refusal", lambda problem: None)
    usual = shapes.Shape("decode", 2, 256, 1, 4, 2, 64, "float32")
    lines = [usual, dataclasses.replace(usual, section="scattered", extent=1)]
    timings = [measuring.measure(machines.Rehearsal(), line, [], 0.0, 2**30) for line in lines]
    verdicts = goals.judge("cpu", timings, CEILINGS)
    found = assembling.assemble("", {}, SETTINGS, CEILINGS, timings)

    for timing in timings:
        assert {"sdpa", "read"} <= timing.ratios.keys()
        shown = found.line(timing.case, "paged").metrics["bandwidth_percent"]
        assert shown == [pytest.approx(100 * timing.ratios["read"].median, rel=1e-3)]
    assert [goal.must for goal in verdicts] == [0.9, 0.7]
    assert [list(values) for values in verdicts.values()] == 2 * [[usual]]
    assert [(x.goal.at_least, x.case) for x in found.verdicts()] == [(0.9, timings[0].case), (0.7, timings[0].case)]


@pytest.mark.parametrize(("ours", "is_met"), [(50.0, True), (200.0, False)])
def test_goals_of_gpus_use_the_measured_copy(ours, is_met):
    """A GiB in so many microseconds is compared with the copy's bandwidth, and with what would be better still."""
    shape = shapes.Shape("decode", 64, 8192, block_size=64)
    ceilings = dataclasses.replace(CEILINGS, copy=shape.kv_bytes / 1e3 / 100)  # a copy takes 100 us
    timing = Timing(shape, times={"paged": ours}, samples={"paged": [ours]})
    found = assembling.assemble("", {}, {"device": "cuda"}, ceilings, [timing])

    assert [(x.value, x.is_met, x.goal.is_stretch) for x in found.verdicts()] == [
        (100 / ours, is_met, False),
        (100 / ours, is_met, True),
    ]


def test_files_say_everything(monkeypatch, tmp_path):
    """What was timed comes back from the file, but for digits that nobody needs."""
    monkeypatch.setattr(measuring, "refusal", lambda problem: None)
    shape = shapes.Shape("mixed", 3, 64, 1, 4, 2, 64, "float32", first=(64, 8))
    timing = measuring.measure(machines.Rehearsal(), shape, [], 0.0, 2**30)
    path = assembling.assemble("", {}, SETTINGS, CEILINGS, [timing]).save(tmp_path / "k.json")
    (again,) = assembling.timings(Results.load(path))

    assert again.shape == shape
    assert again.times == {name: pytest.approx(value, rel=1e-3) for name, value in timing.times.items()}
    assert again.ratios["sdpa"].median == pytest.approx(timing.ratios["sdpa"].median, rel=1e-3)
    assert again.rounds == timing.rounds >= 5


def test_kernels_are_timed_on_the_cpu(tmp_path):
    """Every kind of line has times for us and all peers, right answers, a goal that speaks of it, and a picture."""
    pytest.importorskip("numba")
    pytest.importorskip("matplotlib")
    lines = r"(decode|prefill|chunk) .*(float32) .*(1 x 128|1 x 512)"
    found = run(tmp_path / "k.json", "--device", "cpu", "--quick", "--filter", lines, "--plot")

    sections = {case["section"]: {x.candidate for x in found.lines if x.case == case} for case in found.cases()}
    ratios = {timing.shape.section: timing.ratios for timing in assembling.timings(found)}
    assert sections.keys() == {"decode", "prefill", "chunk"}
    assert sections["decode"] == {"paged", "sdpa", "write+paged", "dynamic"}
    assert ratios["decode"].keys() == {"sdpa", "dynamic"}
    assert sections["chunk"] == {"paged", "sdpa", "gather+sdpa"}
    assert not any(line.note for line in found.lines)
    assert all(line.spread("call_us").min > 0 for line in found.lines)
    errors = [error for shape in found.details["shapes"].values() for error in shape["errors"].values()]
    assert all(0 < error < TOLERANCE for error in errors)
    assert not found.goals  # they are for runs in full
    assert min(found.details["ceilings"]["gflops"].values()) > 0
    assert (tmp_path / "k.png").stat().st_size > 10_000


def test_the_protocol_for_gpus_is_rehearsed(tmp_path, monkeypatch):
    """All lines go through layers in turn, poisoned outputs, variants of ours and the goals of a GPU."""
    pytest.importorskip("numba")
    # What the CPU's kernel leaves to the reference is not worth timing, but has to run on a GPU.
    monkeypatch.setattr(measuring, "refusal", lambda problem: None)
    options = ["--device", "cuda", "--rehearse", "--seconds", "0.001", "--ablate", "kernels.cpu.attention.MAX_ROWS=1"]
    found = run(tmp_path / "k.json", *options)

    wanted = {str(shapes.shrink(shape)) for shape in shapes.cuda_shapes(quick=False)}
    assert found.details["shapes"].keys() == {case["shape"] for case in found.cases()} == wanted
    assert not any(line.note for line in found.lines)
    for timing in assembling.timings(found):
        assert {"paged", "paged MAX_ROWS=1", "sdpa"} <= timing.times.keys()
        assert timing.eager.keys() == timing.times.keys()
        assert timing.rounds >= 5
        assert all(0 < error < 2e-2 for error in timing.errors.values())
    assert max(timing.num_layers for timing in assembling.timings(found)) > 1
    assert any(x.goal.text.startswith("window") for x in found.verdicts())
    assert "paged MAX_ROWS=1" in found.ours


def test_wrong_answers_get_no_times(monkeypatch):
    """Who writes too little, or something else, is left out with the reason; the others are timed all the same."""
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
    timing = measuring.measure(machines.Rehearsal(), shape, [], 0.0, 2**30)

    assert timing.times.keys() == {"paged"}
    assert timing.missing.keys() == {"forgetful", "inexact", "broken"}
    assert timing.missing["broken"].startswith("ZeroDivisionError")
    assert all(timing.missing[name].startswith("WRONG") for name in ("forgetful", "inexact"))
    assert {line.candidate: line.note for line in timing.lines(1.0) if line.note} == timing.missing


@pytest.mark.parametrize("is_old", [False, True])
def test_varlen_is_called_as_its_version_wants(monkeypatch, is_old):
    """torch's varlen attention, which runs on CUDA only, gets packed rows and the options that it has."""
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


def test_no_line_is_begun_when_the_time_is_over(monkeypatch):
    """The rest is named, what was kept until then is complete, and the order of blocks is the usual one again."""
    kept, orders, now = [], dict(storage.ORDERS), iter([0.0, 0.0, 2.0])
    monkeypatch.setattr(measuring, "refusal", lambda problem: "not today")
    monkeypatch.setattr(benchmark, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    options = benchmark.Options("cuda", ["verify"], rehearse=True, budget=1.0, order="NHD")
    found = benchmark.run(options, keep=kept.append)

    assert len(found.cases()) == 1
    assert len(found.details["left_out"]) == len(benchmark.chosen(options)) - 1 > 0
    assert [line.note for line in found.lines] == ["the fast kernel does not take it: not today"]
    assert kept == [found]
    assert orders == storage.ORDERS


def test_options_that_cannot_be_are_refused(monkeypatch):
    """One line that names the value, before anything is measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert "'tpu'" in refused("--device", "tpu")
    assert "no CUDA device" in refused("--device", "cuda")
    assert "for --device cuda" in refused("--device", "cpu", "--rehearse")
    assert "'nhd'" in refused("--device", "cpu", "--order", "nhd")
    assert "'('" in refused("--device", "cpu", "--filter", "(")
    assert "'no such'" in refused("--device", "cpu", "--filter", "no such")
    assert "'tile=x'" in refused("--device", "cpu", "--ablate", "tile=x")
    assert "--output-json" in refused("--device", "cpu", "--plot")


def test_earlier_runs_are_shown_again(tmp_path):
    """`--show` measures nothing: table, goals and picture of a file."""
    pytest.importorskip("matplotlib")
    shape = shapes.Shape("decode", 1, 128, 1, 8, 4, 64, "float32")
    timing = Timing(shape, times={"paged": 2.0, "sdpa": 1.0}, samples={"paged": [2.0], "sdpa": [1.0]})
    where = {"device": "none", "threads": 1, "versions": {"torch": "0"}, "commit": None, "seed": 0, "python": "0"}
    path = assembling.assemble("", where, SETTINGS, CEILINGS, [timing]).save(tmp_path / "k.json")
    before = json.loads(path.read_text(encoding="utf-8"))
    done = CliRunner().invoke(app, ["bench", "kernels", "--show", str(path), "--plot"])

    assert done.exit_code == 0, done.output
    assert "sdpa" in done.output
    assert (tmp_path / "k.png").stat().st_size > 10_000
    assert json.loads(path.read_text(encoding="utf-8")) == before
