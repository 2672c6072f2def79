"""The scheduling benchmark runs, and what it says of queues is true of queues."""

import dataclasses
import math

import pytest
from typer.testing import CliRunner

from paged_cache.bench.results import Results
from paged_cache.bench.scheduling import benchmark, measuring, simulator, workloads
from paged_cache.bench.scheduling.goals import goals
from paged_cache.cli import app

pytestmark = pytest.mark.slow  # says nothing about the installed transformers


def test_it_runs(tmp_path):
    """Every candidate is measured against both baselines, and there is a picture; the runs in full have goals."""
    pytest.importorskip("matplotlib")
    output = tmp_path / "scheduling.json"
    done = CliRunner().invoke(app, ["bench", "scheduling", "--quick", "--plot", "--output-json", str(output)])
    assert done.exit_code == 0, done.output
    found = Results.load(output)

    at = lambda **case: {line.candidate: line for line in found.lines if case.items() <= line.case.items()}  # noqa: E731
    lines = {name: {metric: x for metric, (x,) in line.metrics.items()} for name, line in at(section="slots").items()}
    assert lines["fcfs"]["mean_e2el_ratio"] == pytest.approx(1.0)
    assert lines["sjf"]["mean_e2el_ratio"] < 0.9
    assert lines["srpt, oracle, free preemption"]["mean_e2el_ratio"] < lines["sjf"]["mean_e2el_ratio"]
    names = [f"{name}{end}" for name in measuring.RATIOS.values() for end in ("", measuring.OTHER_BASELINE)]
    assert all(math.isfinite(line[name]) for line in lines.values() for name in names)
    assert at(section="memory").keys() >= {"fcfs", "first-fit fifo", "sjf"}
    assert len(list(dataclasses.replace(found, goals=goals()).verdicts())) == 9
    assert at(section="overhead", num_waiting=1000)["sjf"].metrics["admit_us"][0] > 0
    assert {one["baseline"] for one in found.details["workloads"]} == {"fcfs", "first-fit fifo"}
    assert (tmp_path / "scheduling.png").stat().st_size > 10_000


def test_processes_change_nothing():
    """Two processes find what one finds."""
    options = benchmark.Options(["tenants", "mixed"], [1.0], [1.0], 40, 1, waiting=())
    alone, together = (benchmark.run(dataclasses.replace(options, jobs=jobs)).lines for jobs in (1, 2))

    assert alone == together
    assert {line.case["section"] for line in alone} == {"slots", "memory"}


def test_the_engine_is_read_from_a_file(tmp_path):
    """What the file does not say stays as it is."""
    path = tmp_path / "engine.json"
    path.write_text('{"per_step": 1, "name": "mine"}', encoding="utf-8")

    assert benchmark.read_engine(3, path) == simulator.Engine(slots=3, per_step=1.0)
    assert benchmark.read_engine(16, None) == simulator.Engine()


def test_names_and_numbers_that_cannot_be_are_refused():
    """The message has the value, and says what would be right."""
    for option, value in (("--workloads", "nobody"), ("--loads", "1,x"), ("--memory-loads", "-1")):
        done = CliRunner().invoke(app, ["bench", "scheduling", option, value])
        assert done.exit_code == 2
        assert value in done.output
    with pytest.raises(ValueError, match="nobody"):
        benchmark.run(benchmark.Options(["nobody"]))


def test_skipping_changes_nothing():
    """Steps taken many at a time end at the same times as steps taken one by one."""
    engine = simulator.Engine(slots=4, num_blocks=600)
    jobs = workloads.arrive("mixed", workloads.make_jobs("mixed", 120, 3), 1.2, 3)
    slow, fast = (simulator.Simulation(engine, jobs, skips=skips, policy="fcfs") for skips in (False, True))

    assert [o.latency for o in fast.run()] == pytest.approx([o.latency for o in slow.run()])
    assert fast.num_steps == slow.num_steps


def test_a_request_alone_takes_what_the_formula_says():
    """A prompt in pieces of the budget, then a step per token."""
    engine = simulator.Engine(budget=100, per_step=1.0, per_token=0.01, per_kv=0.001)
    (outcome,) = simulator.Simulation(engine, [workloads.Job(250, 3, 10)]).run()

    assert outcome.first_token == pytest.approx(3 + 250 * 0.01 + 0.001 * (100 + 200 + 250))
    assert outcome.latency == pytest.approx(outcome.first_token + 2 * 1.01 + 0.001 * (251 + 252))


def test_workloads_come_from_their_seeds():
    """The same seed gives the same requests, other seeds others; the mean rate is the one asked for; traces are in order."""
    for name in workloads.WORKLOADS:
        first, same, other = (workloads.make_jobs(name, 1500, seed) for seed in (0, 0, 1))
        assert first == same != other
        assert all(1 <= job.output <= job.max_new and job.hit < job.prompt for job in first)
        times = [job.time for job in workloads.arrive(name, first, 2.5, 0)]
        assert times == sorted(times)
        assert len(times) / times[-1] == pytest.approx(2.5, rel=0.01)


def test_the_reference_is_not_beaten():
    """Without a queue the reference equals everybody; with one, the mean of the real scheduler is no better."""
    jobs = workloads.make_jobs("mixed", 200, 0)
    engine = simulator.Engine()
    for rate, is_equal in ((0.05, True), (4.0, False)):
        arrivals = workloads.arrive("mixed", jobs, rate, 0)
        best, real = (measuring.serve(engine, arrivals, name)["mean"] for name in (measuring.FREE_SRPT, "sjf, oracle"))
        assert best == pytest.approx(real, rel=0.01) if is_equal else best < real
