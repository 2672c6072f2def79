"""Decode steps, batches and first tokens: what is timed agrees with the reference, and who is wrong has no times."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from paged_cache.bench import decode, latency, startup, stepping
from paged_cache.bench.measuring import WrongAnswerError
from paged_cache.bench.results import Results
from paged_cache.bench.scheduling import benchmark as scheduling
from paged_cache.bench.serving.peers import GENERATE_BATCH
from paged_cache.bench.workload import Workload
from paged_cache.cli import app
from paged_cache.errors import InvalidRequestError

TOLERANCE = 1e-4
CPU = ("--device", "cpu", "--threads", "1")


def run(command, output, *options):
    """The results that a command wrote."""
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, ["bench", command, *CPU, *options, "--output-json", str(output)])
    assert done.exit_code == 0, done.output
    assert torch.get_num_threads() == threads
    return Results.load(output)


@pytest.mark.parametrize("model", ["layers", "shipped"])
def test_decode_steps_agree(tmp_path, model):
    """The timed steps give the same outputs with all caches, beyond the growth after which they are cropped."""
    found = run("decode", tmp_path / "decode.json", "--model", model, "--quick")

    assert found.cases() == [{"batch_size": size, "context": 128} for size in (1, 2)]
    assert found.candidates() == ["dynamic", "paged", "static"]
    for line in found.lines:
        assert not line.note
        assert line.spread("step_ms").min > line.spread("layer_ms").min > 0
    for case in found.details["cases"]:
        assert 0 < case["worst_difference"] < TOLERANCE
        assert case["rounds"] >= 5
    judged = replace(found, goals=decode.GOALS)
    assert [x.goal.at_most for x in judged.verdicts()] == [1.0]


def race(model, context=40):
    """Three caches with the same tokens."""
    return decode.Race(stepping.make_steppers(model, 2, context), TOLERANCE, model.config.vocab_size)


@pytest.fixture(scope="module")
def layers():
    """A small model of attention."""
    return stepping.make_model("layers", "cpu", "float32", 0)


@torch.no_grad()
def test_caches_stay_as_long_as_the_context(layers):
    """After so many steps that all were cropped, each has the context and the steps since; outputs still agree."""
    steps = race(layers)
    for _ in range(stepping.GROWTH + 3):
        steps.round()

    lengths = {name: int(stepper.cache.get_seq_length()) for name, stepper in steps.steppers.items()}
    assert lengths == dict.fromkeys(("dynamic", "paged", "static"), 43)
    assert 0 < steps.worst < TOLERANCE
    assert not steps.notes


@torch.no_grad()
def test_turns_of_many_steps(layers):
    """A quick case has eight steps in a turn, a slow one as many as the time allows; caches stay as long as the context."""
    steps = race(layers)
    steps.round()
    for seconds, turn in ((0.001, 8), (0.03, 3), (1.0, 1)):
        for stepper in steps.steppers.values():
            stepper.steps += [seconds] * decode.WARM_UP
        steps.lengthen_turns()
        assert steps.turn == turn
        before = len(steps.steppers["paged"].steps)
        for _ in range(9):
            steps.round()
        assert len(steps.steppers["paged"].steps) == before + 9 * turn

    lengths = {int(stepper.cache.get_seq_length()) for stepper in steps.steppers.values()}
    assert len(lengths) == 1
    assert 40 <= lengths.pop() < 40 + stepping.GROWTH
    assert not steps.notes


@torch.no_grad()
def test_steps_with_a_paged_cache_are_those_of_generate(layers, monkeypatch):
    """Each takes the path of a decoding step with known tokens, and blocks that it fills can be found by later prompts."""
    steps = race(layers)
    pool = steps.steppers["paged"].cache.pool
    manager, appended = pool.manager, []
    append = manager.append
    monkeypatch.setattr(manager, "append", lambda rows, tokens: appended.append(tokens) or append(rows, tokens))
    before = len(manager.index)
    given = []
    for _ in range(9):
        given.append(steps._ids.flatten().tolist())
        steps.round()

    assert before == 2 * (40 // 16)
    assert appended == given
    assert len(manager.index) == 2 * (48 // 16)


@torch.no_grad()
def test_steppers_share_their_weights(layers):
    """Three candidates do not need three times the memory, and the model itself stays unpatched."""
    first, *others = (stepper._forward for stepper in stepping.make_steppers(layers, 1, 8))

    for other in others:
        pairs = zip(first.parameters(), other.parameters(), strict=True)
        assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert layers.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_peer_with_other_outputs_is_left_out(layers):
    """The others go on without it, and it has a note."""
    steps = race(layers)
    steps.steppers["static"].cache.layers[0].values += 1
    steps.round()
    steps.round()

    assert steps.steppers.keys() == {"dynamic", "paged"}
    assert "outputs with static differ" in steps.notes["static"]


@torch.no_grad()
@pytest.mark.parametrize("is_timed", [False, True])
def test_ours_with_other_outputs_is_an_error(layers, is_timed):
    """There are no times for wrong results, whether they show at once or while times are taken."""
    steps = race(layers)
    pool = steps.steppers["paged"].cache.pool
    for blocks in pool.storage.layers.values():
        blocks.values.add_(1)

    turn = (lambda: [watch() for watch in steps.watches().values()]) if is_timed else steps.round

    with pytest.raises(WrongAnswerError, match="paged differ"):
        turn()


def test_outputs_are_compared_as_precisely_as_they_are():
    """In float32 one wrong number is enough; in 16 bits all of them together count."""
    expected = torch.ones(100, 100)
    output = expected.clone()
    output[3, 4] += 0.5
    halves = [x.to(torch.bfloat16) for x in (output, expected)]

    assert decode.difference(output, expected) == pytest.approx(0.5)
    assert decode.difference(*halves) == pytest.approx(0.005)
    assert decode.difference(expected * float("nan"), expected) != 0


def test_what_does_not_fit_is_named(tmp_path):
    """A case that needs more memory than there is has a note instead of times; the others are measured."""
    options = ["--model", "layers", "--batch-sizes", "1", "--contexts", "16,512", "--memory", "0.005", "--seconds", "0"]
    small, large = run("decode", tmp_path / "decode.json", *options).cases()
    found = Results.load(tmp_path / "decode.json")

    assert found.line(small, "paged").metrics["step_ms"]
    assert found.line(large, "paged").note.startswith("left out: needs")


def test_one_batch_has_the_same_tokens_by_everybody(tmp_path):
    """`bench latency` has vLLM's keys for each candidate, and the tokens of `generate` with `DynamicCache`."""
    found = run("latency", tmp_path / "latency.json", "--model", "tiny", "--quick")

    batches = ["generate_batch"] if GENERATE_BATCH else []
    expected = [latency.DYNAMIC, latency.PAGED, latency.BATCHER, latency.STATIC, *batches]
    assert found.cases() == [{"input_len": 8, "output_len": 8, "batch_size": 2}]
    assert found.candidates() == expected
    for line in found.lines:
        assert not line.note
        assert line.metrics["equal_percent"] == [100.0, 100.0]
        assert line.spread("latency_s").min > 0
        times = zip(*(line.metrics[name] for name in ("latency_s", "ttft_ms", "tpot_ms")), strict=True)
        assert all(1e3 * whole * 1.001 > first + 7 * each > first > 0 for whole, first, each in times)
        said = found.details[line.candidate]
        assert said["latencies"] == line.metrics["latency_s"]
        assert said["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
        assert said["avg_latency"] == pytest.approx(sum(said["latencies"]) / 2)


def test_peers_can_be_chosen(tmp_path):
    """Beside the reference only those that are asked for; a name that nobody has is refused."""
    found = run("latency", tmp_path / "latency.json", "--model", "tiny", "--quick", "--peer", "static")
    done = CliRunner().invoke(app, ["bench", "latency", *CPU, "--model", "tiny", "--quick", "--peer", "vllm"])

    assert found.candidates() == [latency.DYNAMIC, latency.PAGED, latency.BATCHER, latency.STATIC]
    assert done.exit_code == 1
    assert "peer is 'vllm'" in done.output


def test_prompts_are_not_remembered():
    """All rounds have the same prompts: no candidate of ours may find them in a pool of an earlier round."""
    model = latency.models.make_model("tiny")
    workload = Workload([list(range(1, 65))] * 2, [2, 2])
    paged = next(x for x in latency.candidates(model, workload, []) if x.name == latency.PAGED)
    lengths = []
    model.register_forward_pre_hook(lambda *call: lengths.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    paged.run()
    paged.run()
    pool = paged.make_cache().pool

    assert lengths == [64, 1, 64, 1]
    assert pool.manager.prefix_caching


def test_wrong_tokens_have_no_times(monkeypatch):
    """In float32 ours raises; in bfloat16 equal tokens are counted instead."""
    settings = latency.Settings(model="tiny", peers=(), **latency.QUICK)
    run_rightly = latency.Serve.run

    def wrong(self):
        sample = run_rightly(self)
        return latency.Sample([[1] * 8, *sample.answer[1:]], sample.metrics | {"equal_percent": 50.0})

    monkeypatch.setattr(latency.Serve, "run", wrong)
    with pytest.raises(WrongAnswerError, match="ContinuousBatcher: request 0 differs"):
        latency.run(settings)
    found = latency.run(latency.Settings(**{**vars(settings), "dtype": "bfloat16"}))

    assert found.lines[-1].metrics["equal_percent"] == [50.0, 50.0]


def test_requests_need_positions():
    """A batch that is longer than the model can count is refused with both numbers."""
    with pytest.raises(InvalidRequestError, match="17000: the model has 16384"):
        latency.run(latency.Settings(model="tiny", input_len=16990, output_len=10))


def test_first_tokens_of_fresh_processes_agree(tmp_path, monkeypatch):
    """Plain generate does not import this package, the batcher's process says the same token; parts add up."""
    script = tmp_path / "script.py"
    end = "\nassert bool([x for x in sys.modules if x.startswith('paged_cache')]) == (sys.argv[1] != 'plain')\n"
    script.write_text(startup.SCRIPT.read_text(encoding="utf-8") + end, encoding="utf-8")
    monkeypatch.setattr(startup, "SCRIPT", script)
    samples = [startup.Start(name, startup.Settings(threads=1)).run() for name in (startup.PLAIN, startup.BATCHER)]

    assert samples[0].answer == samples[1].answer != []
    for sample in samples:
        parts = [sample.metrics[name] for name in ("import_s", "load_s", "first_token_s")]
        assert min(parts) > 0
        assert sample.metrics["startup_s"] == pytest.approx(sum(parts))


def test_starts_are_measured_in_turns(monkeypatch, tmp_path):
    """Every way takes its turn after a round that does not count, then once with nothing compiled; only the former is judged."""
    calls, folders = [], []

    def answer(command, variables):
        way, options = command[-2], json.loads(command[-1])
        calls.append(way)
        folders.extend(list(Path(x).iterdir()) for x in variables.values())
        assert options["threads"] == 1
        seconds = {"plain": 1.0, "paged": 1.2, "batcher": 1.4}[way] + 9 * len(variables) * (way == "batcher")
        return {"import_s": seconds, "load_s": 0.0, "first_token_s": 0.0, "tokens": [3]}

    monkeypatch.setattr(startup, "_answer", answer)
    found = run("startup", tmp_path / "startup.json", "--quick")

    assert sorted(calls) == sorted(4 * ["plain", "paged", "batcher"])
    assert folders == [[], [], []]
    assert [len(line.metrics["startup_s"]) for line in found.lines] == [2, 2, 2, 1, 1, 1]
    assert found.lines[-1].metrics["startup_s"] == [pytest.approx(10.4)]
    judged = replace(found, goals=startup.GOALS)
    assert [(x.value, x.is_met) for x in judged.verdicts()] == [(1.2, True), (1.4, False)]


def test_a_process_without_a_token_says_why():
    """The last line of its error, not a traceback of ours; plain generate is not allowed to fail either."""
    with pytest.raises(startup.StartError, match=r"code 1: .*no such thing"):
        startup._answer([sys.executable, "-c", "raise ValueError('no such thing')"])


class StoppedError(Exception):
    """Instead of a measurement."""


@pytest.mark.parametrize(
    ("arguments", "module", "expected"),
    [
        ("decode --batch-sizes 4 --contexts 64", decode, {"batch_sizes": [4], "contexts": [64], "seconds": 0.1}),
        ("decode --seconds 0", decode, {"batch_sizes": (1, 2), "contexts": (128,), "seconds": 0}),
        ("latency --input-len 40 --batch-size 3", latency, {"input_len": 40, "batch_size": 3, "output_len": 8}),
        ("latency --num-iters 5 --num-iters-warmup 0", latency, {"num_iters": 5, "num_iters_warmup": 0}),
        ("startup --rounds 7", startup, {"rounds": 7}),
        ("startup", startup, {"rounds": 2}),
        ("scheduling --loads 0.5 --rounds 2", scheduling, {"loads": [0.5], "seeds": 2, "memory_loads": (1.1,)}),
        ("scheduling --workloads mixed --num-prompts 30", scheduling, {"workloads": ["mixed"], "count": 30}),
    ],
)
def test_quick_keeps_what_is_given(monkeypatch, arguments, module, expected):
    """`--quick` fills in only what was not typed."""
    seen = []

    def stop(settings, *rest):
        seen.append(settings)
        raise StoppedError

    monkeypatch.setattr(module, "run", stop)
    command, *options = arguments.split()
    done = CliRunner().invoke(app, ["bench", command, "--quick", *options])

    assert isinstance(done.exception, StoppedError), done.output
    assert {name: getattr(seen[0], name) for name in expected} == expected


def test_options_that_cannot_be_are_refused(monkeypatch):
    """One line that names the value, before anything is measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cuda"], "no CUDA device"),
        (["--dtype", "int8"], "'int8'"),
        (["--contexts", "1,x"], "'1,x'"),
        (["--batch-sizes", "0"], "'0'"),
    ):
        done = CliRunner().invoke(app, ["bench", "decode", *options])
        assert done.exit_code == 2
        assert message in done.output
