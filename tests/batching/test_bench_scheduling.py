"""The scheduling benchmark runs, and what it says of queues is true of queues."""

import importlib
import json
import math
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    """The folder of the scripts is where they find the parts they share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield lambda name: importlib.import_module(f"scheduling.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "scheduling"]:
        del sys.modules[name]


@pytest.mark.usefixtures("parts")
def test_it_runs(tmp_path):
    """Every candidate is measured against both baselines, there are verdicts, and a picture."""
    pytest.importorskip("matplotlib")
    output = tmp_path / "scheduling.json"
    runpy.run_path(str(BENCHMARKS / "bench_scheduling.py"))["main"](["--quick", "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))

    lines = {line["policy"]: line for line in found["summaries"] if line["baseline"] == "fcfs"}
    assert lines["fcfs"]["mean"] == pytest.approx(1.0)
    assert lines["sjf"]["mean"] < 0.9
    assert lines["srpt, oracle, free preemption"]["mean"] < lines["sjf"]["mean"]
    assert all(math.isfinite(line[metric]) for line in lines.values() for metric in ("p99", "ttft", "throughput"))
    assert {line["policy"] for line in found["memory"]} >= {"fcfs", "first-fit fifo", "sjf"}
    assert len(found["goals"]) == 9
    assert found["overhead"][0]["admit"] > 0
    assert (tmp_path / "scheduling.png").stat().st_size > 10_000


def test_skipping_changes_nothing(parts):
    """Steps taken many at a time end at the same times as steps taken one by one."""
    simulator, workloads = parts("simulator"), parts("workloads")
    engine = simulator.Engine(slots=4, num_blocks=600)
    jobs = workloads.arrive("mixed", workloads.make_jobs("mixed", 120, 3), 1.2, 3)
    slow, fast = (simulator.Simulation(engine, jobs, skips=skips, policy="fcfs") for skips in (False, True))

    assert [o.latency for o in fast.run()] == pytest.approx([o.latency for o in slow.run()])
    assert fast.num_steps == slow.num_steps


def test_a_request_alone_takes_what_the_formula_says(parts):
    """A prompt in pieces of the budget, then a step per token."""
    simulator, workloads = parts("simulator"), parts("workloads")
    engine = simulator.Engine(budget=100, per_step=1.0, per_token=0.01, per_kv=0.001)
    (outcome,) = simulator.Simulation(engine, [workloads.Job(250, 3, 10)]).run()

    assert outcome.first_token == pytest.approx(3 + 250 * 0.01 + 0.001 * (100 + 200 + 250))
    assert outcome.latency == pytest.approx(outcome.first_token + 2 * 1.01 + 0.001 * (251 + 252))


def test_workloads_come_from_their_seeds(parts):
    """The same seed gives the same requests, other seeds others; the mean rate is the one asked for; traces are in order."""
    workloads = parts("workloads")
    for name in workloads.WORKLOADS:
        first, same, other = (workloads.make_jobs(name, 1500, seed) for seed in (0, 0, 1))
        assert first == same != other
        assert all(1 <= job.output <= job.max_new and job.hit < job.prompt for job in first)
        times = [job.time for job in workloads.arrive(name, first, 2.5, 0)]
        assert times == sorted(times)
        assert len(times) / times[-1] == pytest.approx(2.5, rel=0.01)


def test_the_reference_is_not_beaten(parts):
    """Without a queue the reference equals everybody; with one, the mean of the real scheduler is no better."""
    measuring, simulator, workloads = parts("measuring"), parts("simulator"), parts("workloads")
    jobs = workloads.make_jobs("mixed", 200, 0)
    engine = simulator.Engine()
    for rate, is_equal in ((0.05, True), (4.0, False)):
        arrivals = workloads.arrive("mixed", jobs, rate, 0)
        best, real = (measuring.serve(engine, arrivals, name)["mean"] for name in (measuring.FREE_SRPT, "sjf, oracle"))
        assert best == pytest.approx(real, rel=0.01) if is_equal else best < real
