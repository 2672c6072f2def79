"""vLLM's process is asked and answered in lines, and whatever goes wrong with it ends in one line; here a script stands in for it."""

import importlib.util
import json
import os
import sys
import time
import types
from pathlib import Path

import pytest

from paged_cache.bench import models
from paged_cache.bench.serving import comparing, vllm_peer, vllm_script
from paged_cache.bench.serving.arrivals import make_pace
from paged_cache.bench.serving.comparing import Settings
from paged_cache.bench.serving.metrics import throughput_metrics
from paged_cache.bench.serving.outcome import Pace
from paged_cache.bench.serving.vllm_peer import PeerError, Vllm
from paged_cache.bench.workload import Workload

WORKLOAD = Workload([[1, 2], [3]], [2, 3])
PYTHON = Path(sys.executable)

# Answers are the last token of the prompt, again and again; told what it was started with.
COUNTS = """
import json, os, sys
options = json.loads(sys.stdin.readline())
print(json.dumps({"versions": {"vllm": "0", "options": options, "cores": os.environ["VLLM_CPU_OMP_THREADS_BIND"]}}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    tokens = [[prompt[-1]] * count for prompt, count in zip(task["prompts"], task["num_new"])]
    times = [[arrival + 1.0 + i for i in range(len(row))] for row, arrival in zip(tokens, task["arrivals"])]
    found = {"seconds": 4.0, "tokens": tokens, "times": times, "arrivals": task["arrivals"], "cached_tokens": 5}
    print(json.dumps(found), flush=True)
"""
HELLO = 'import json, sys, time; sys.stdin.readline(); print(json.dumps({"versions": {}}), flush=True)\n'


@pytest.fixture
def peer(tmp_path):
    """A peer that runs this script."""

    def make(code, **options):
        script = tmp_path / "script.py"
        script.write_text(code, encoding="utf-8")
        return Vllm(
            PYTHON, {"model": "m"}, 1000, script=script, **({"start_seconds": 60, "round_seconds": 60} | options)
        )

    return make


def test_rounds_are_asked_for_one_by_one(peer):
    """One process serves all rounds; tokens, times and arrivals come back, and it is told how much memory it has."""
    with peer(COUNTS) as vllm:
        runs = [vllm.serve(WORKLOAD), vllm.serve(WORKLOAD, Pace([0.5, 2.0]))]
        process = vllm._process
        assert process.poll() is None

    assert process.returncode == 0
    assert vllm.versions["options"] == {"model": "m", "kv_cache_memory_bytes": 1000}
    assert vllm.versions["cores"] == str(min(os.sched_getaffinity(0)))
    assert [run.tokens for run in runs] == [[[2, 2], [3, 3, 3]]] * 2
    assert [request.arrival for request in runs[1].requests] == [0.5, 2.0]
    assert {(request.ttft, request.tpot) for run in runs for request in run.requests} == {(1.0, 1.0)}
    assert (runs[0].seconds, runs[0].kv_allocated, runs[0].cached_tokens) == (4.0, 1000, 5)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('import sys; print("hm\\nno room at all\\n", file=sys.stderr); sys.exit(3)', "code 3: no room at all"),
        ('import json; input(); print(json.dumps({"error": "vllm of x: no"}))', "vllm of x: no"),
        ("import time; time.sleep(60)", "not answer within 0.5 s"),
    ],
)
def test_who_does_not_start_says_why(peer, code, message):
    """The end of its log, its own words, or that it says nothing; the process is gone."""
    vllm = peer(code, start_seconds=0.5 if "sleep" in code else 60)
    with pytest.raises(PeerError, match=message), vllm:
        pass

    assert vllm._process.poll() is not None


def test_no_interpreter():
    """A path that is no program is named."""
    with pytest.raises(PeerError, match="cannot run /nope/python: No such file"), Vllm(Path("/nope/python"), {}, 1):
        pass


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_an_environment_without_vllm():
    """The real script, where vllm cannot be imported, says so, and which interpreter it was."""
    with pytest.raises(PeerError, match=r"ModuleNotFoundError: No module named 'vllm"), Vllm(PYTHON, {}, 1):
        pass


@pytest.mark.parametrize("code", [HELLO + "time.sleep(60)", HELLO + "sys.stdin.readline(); sys.exit('out of memory')"])
def test_failures_get_no_times(peer, code):
    """Who does not answer, or dies, has a note instead of times, is not asked again, and the others go on."""
    ours = comparing.Loop(models.make_model("tiny"), name="sjf")
    with peer(code, round_seconds=1) as vllm:
        start = time.monotonic()
        for _ in range(2):
            settings = Settings("tiny", rounds=1)
            found = comparing.compare([ours, vllm], {}, WORKLOAD, None, throughput_metrics, settings, lambda name: None)
            lines = {line.candidate: line for line in found}
            assert lines["sjf"].metrics["num_requests"] == [2]
            assert not lines["vllm"].metrics
            assert lines["vllm"].note.startswith("PeerError: vllm ")
        assert time.monotonic() - start < 30


def test_vllm_gets_what_we_have(monkeypatch):
    """Room for all requests, as many sequences at a time, prefixes as in our pools, and a folder with the same model."""
    started = []
    monkeypatch.setattr(vllm_peer.Vllm, "__enter__", lambda self: started.append(self) or self)
    monkeypatch.setattr(vllm_peer.Vllm, "__exit__", lambda self, *error: None)
    model = models.make_model("tiny")
    with comparing.servers(Settings("tiny", peers=("vllm",)), ["loop", "vllm"], model, [WORKLOAD]) as (_, vllm):
        config = json.loads((Path(vllm.options["model"]) / "config.json").read_text(encoding="utf-8"))

    assert started == [vllm]
    assert config["hidden_size"] == 64
    assert vllm.options["max_num_seqs"] == 64
    assert vllm.options["enable_prefix_caching"]
    assert vllm.options["max_model_len"] == 4
    assert vllm.kv_bytes >= 8 * models.kv_bytes_per_token(model)


class FakeEngine:
    """Steps like vLLM's engine: each gives every request a token; what comes is counted."""

    def __init__(self):
        self.open, self.most, self.num_resets = {}, 0, 0

    def reset_prefix_cache(self):
        self.num_resets += 1

    def has_unfinished_requests(self):
        return bool(self.open)

    def add_request(self, name, prompt, params):
        self.open[name] = [prompt["prompt_token_ids"][-1], params.options["max_tokens"]]
        self.most = max(self.most, len(self.open))

    def step(self):
        time.sleep(0.002)
        outputs = []
        for name, entry in list(self.open.items()):
            entry[1] -= 1
            part = types.SimpleNamespace(token_ids=[entry[0]])
            finished = entry[1] == 0
            outputs.append(
                types.SimpleNamespace(request_id=name, outputs=[part], finished=finished, num_cached_tokens=1)
            )
            if finished:
                del self.open[name]
        return outputs


@pytest.mark.parametrize("limit", [None, 2])
def test_requests_are_fed_as_they_come(monkeypatch, limit):
    """Nobody gets a token before it came, all get theirs, and no more are under way than allowed."""
    params = lambda **options: types.SimpleNamespace(options=options)  # noqa: E731
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=params))
    kinds = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(DELTA=1))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    engine, pace = FakeEngine(), make_pace(6, 100, max_concurrency=limit)
    task = {"prompts": [[7], [8]] * 3, "num_new": [9, 4] * 3, "max_concurrency": limit}
    found = vllm_script.Round(engine, task | {"arrivals": pace.arrivals}).serve()

    assert found["tokens"] == [[7] * 9, [8] * 4] * 3
    assert [len(times) for times in found["times"]] == [9, 4] * 3
    assert all(times[0] > arrival for times, arrival in zip(found["times"], found["arrivals"], strict=True))
    assert all(came >= due for came, due in zip(found["arrivals"], pace.arrivals, strict=True))
    assert found["seconds"] >= pace.arrivals[-1]
    assert found["cached_tokens"] == 6
    assert engine.num_resets == 1
    assert engine.most <= (limit or 6)
    assert (found["arrivals"] == pace.arrivals) == (limit is None)
