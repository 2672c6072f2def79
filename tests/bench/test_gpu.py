"""`bench gpu` runs all of its parts within its time, whatever becomes of each; nothing here needs a GPU."""

import time

import pytest
import torch
from typer.testing import CliRunner

from paged_cache.bench import gpu
from paged_cache.bench.kernels import measuring
from paged_cache.bench.results import Results
from paged_cache.cli import app
from paged_cache.errors import InvalidRequestError

NAMES = [part.name for part in gpu.PARTS]


def in_this_process(arguments, seconds, log):
    """Runs a command without a process of its own."""
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(app, arguments)
    finally:
        torch.set_num_threads(threads)
    log.write_text(done.output, encoding="utf-8")
    return done.exit_code


def test_all_of_it_is_rehearsed(tmp_path, monkeypatch):
    """Every part's command runs on the CPU and leaves results in the format, and there is a report of them."""
    pytest.importorskip("numba")
    monkeypatch.setattr(measuring, "refusal", lambda problem: None)
    outcomes = gpu.run(tmp_path, 5.0, rehearse=True, runner=in_this_process)

    assert [(x.name, x.problem, x.has_results) for x in outcomes] == [(name, "", True) for name in NAMES]
    for name in NAMES:
        assert any(line.metrics for line in Results.load(tmp_path / f"{name}.json").lines)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(name in report for name in NAMES)


def test_commands_for_a_gpu_have_options_that_exist():
    """Nobody has run them: at least each name and value of an option is one that the command takes."""
    import typer

    bench = typer.main.get_command(app).commands["bench"]
    for part in gpu.PARTS:
        arguments = part.arguments("8b", 100.0, gpu.Path("out"), is_rehearsal=False)
        command = bench.commands[arguments[1]]
        context = command.make_context(arguments[1], arguments[2:])
        assert context.params["output_json"] == gpu.Path("out") / f"{part.name}.json"
        assert context.params["device"] == "cuda"
        if part.has_model:
            assert (context.params["model"], context.params["dtype"]) == ("8b", "bfloat16")
        if part.has_budget:
            assert context.params["budget"] == 80.0


def test_time_is_shared(tmp_path):
    """Each part gets its share of what is left, and none is begun when nothing is left."""
    allowed = []

    def runner(arguments, seconds, log):
        allowed.append(seconds)
        log.write_text("", encoding="utf-8")
        return 0

    gpu.run(tmp_path, 10.0, runner=runner)
    weights = [part.weight for part in gpu.PARTS]
    outcomes = gpu.run(tmp_path, 0.0, runner=runner)

    shares = [weight / sum(weights[i:]) for i, weight in enumerate(weights)]
    assert allowed == [pytest.approx(600 * share, rel=0.01) for share in shares]
    assert {x.problem for x in outcomes} == {"not begun: the time is over"}


def test_parts_fail_alone(tmp_path):
    """One that crashes and one that is stopped cost nothing but themselves; what they wrote until then stays."""
    kept = Results("latency_cuda", "kept", "", {"device": "none", "versions": {}, "commit": None, "seed": 0})

    def runner(arguments, seconds, log):
        log.write_text("first\nCUDA error: an illegal address", encoding="utf-8")
        if "latency" in arguments:
            kept.save(tmp_path / "latency_cuda.json")
            return None
        return 0 if "decode" in arguments else 1

    outcomes = {x.name: x for x in gpu.run(tmp_path, 1.0, runner=runner)}

    assert outcomes.keys() == set(NAMES)
    assert outcomes["kernels_cuda"].problem.endswith("CUDA error: an illegal address")
    assert outcomes["latency_cuda"].problem.startswith("stopped after")
    assert outcomes["latency_cuda"].has_results
    assert not outcomes["decode_cuda"].problem
    assert not outcomes["decode_cuda"].has_results
    assert (tmp_path / "report.md").exists()


def test_old_results_do_not_pass_for_new_ones(tmp_path):
    """A file of an earlier run is gone when its part begins."""
    (tmp_path / "decode_cuda.json").write_text("{}", encoding="utf-8")
    (outcome,) = gpu.run(tmp_path, 1.0, only=["decode_cuda"], runner=lambda arguments, seconds, log: None)

    assert not outcome.has_results


def test_processes_are_stopped_in_time(tmp_path, monkeypatch):
    """A command that goes on is ended, and its output is in the log; one that ends has its own code."""
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sh")
    script = tmp_path / "script"
    script.write_text("echo begun; sleep 60", encoding="utf-8")
    monkeypatch.setattr(gpu, "ENTRY", [str(script)])
    start = time.monotonic()

    assert gpu.run_process([], 0.5, tmp_path / "log") is None
    assert time.monotonic() - start < 20
    assert (tmp_path / "log").read_text(encoding="utf-8") == "begun\n"
    script.write_text("exit 3", encoding="utf-8")
    assert gpu.run_process([], 20.0, tmp_path / "log") == 3


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    """One line, exit code 2, and nothing is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "gpu", "--output-dir", str(tmp_path / "out")])

    assert done.exit_code == 2
    assert done.output.strip().count("\n") == 0
    assert "no CUDA device" in done.output
    assert not (tmp_path / "out").exists()


def test_parts_have_names(tmp_path):
    """Another one is refused with those that there are."""
    with pytest.raises(InvalidRequestError, match=r"'kernels'.*kernels_cuda"):
        gpu.run(tmp_path, 1.0, only=["kernels"], rehearse=True)
