"""Traces: files that viewers read, spans that tell what happened, memory that stays bounded."""

import json
from itertools import pairwise

import pytest

from paged_cache import InvalidRequestError
from paged_cache.observability import ChromeTrace, Finished, Generated, Preempted, Prefilled, Queued
from tests.batching.alone import prompt
from tests.batching.faults import GREEDY, PROMPTS, batching, run, submit_all
from tests.observability.runs import Clock, run_to_every_end, run_with_preemptions

pytestmark = pytest.mark.timeout(30)

PHASES = {"X": {"dur", "args"}, "i": {"s", "args"}, "C": {"args"}, "M": {"args"}}
"""What entries of a phase have besides name, ph, pid, tid and ts."""


def read(trace, tmp_path):
    """The entries of a saved file, after checks of the format."""
    data = json.loads(trace.save(tmp_path / "new" / "trace.json").read_text(encoding="utf-8"))
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"}
    entries = data["traceEvents"]
    for entry in entries:
        assert {"name", "ph", "pid", "tid", "ts"} | PHASES[entry["ph"]] <= set(entry), entry
        assert isinstance(entry["pid"], int)
        assert isinstance(entry["tid"], int)
        assert entry["ts"] >= 0
        assert entry.get("dur", 0) >= 0
        if entry["ph"] == "C":
            assert all(isinstance(value, int) for value in entry["args"].values())
    named = {(entry["pid"], entry["tid"]) for entry in entries if entry["name"] == "thread_name"}
    assert {(entry["pid"], entry["tid"]) for entry in entries if entry["ph"] in "Xi"} <= named
    processes = {entry["pid"]: entry["args"]["name"] for entry in entries if entry["name"] == "process_name"}
    assert sorted(processes.values()) == ["engine", "requests"]
    for track in named:
        spans = sorted((e for e in entries if e["ph"] == "X" and (e["pid"], e["tid"]) == track), key=lambda e: e["ts"])
        for one, next_one in pairwise(spans):
            assert one["ts"] + one["dur"] <= next_one["ts"] + 1e-3, (one, next_one)  # rounded nanoseconds
    return entries


def track_of(entries, request_id):
    """The entries of one request."""
    (name,) = [e for e in entries if e["name"] == "thread_name" and e["args"]["name"] == request_id]
    return [e for e in entries if e["ph"] in "Xi" and (e["pid"], e["tid"]) == (name["pid"], name["tid"])]


def test_file_of_a_run(tmp_path):
    """A track per request with its phases in microseconds, one of steps, and counters of each step."""
    clock = Clock()
    with batching(max_num_batched_tokens=16, max_num_seqs=2, clock=clock) as batcher:
        trace = batcher.observe(ChromeTrace())
        outputs = run(batcher, submit_all(batcher))
        outputs += run(batcher, [batcher.submit(PROMPTS[4], **GREEDY, request_id="again")])
        stats = batcher.stats()
    entries = read(trace, tmp_path)
    for output in outputs:
        track = track_of(entries, output.request_id)
        spans = [entry for entry in track if entry["ph"] == "X"]
        names = [span["name"] for span in spans]
        assert names == ["queued", *["prefill"] * (len(names) - 2), "decode"]
        assert sum(span["args"]["tokens"] for span in spans[1:-1]) == len(output.prompt_ids) - output.cached_tokens
        assert spans[-1]["args"]["tokens"] == len(output.generated_tokens)
        assert spans[0]["dur"] == pytest.approx(1e6 * output.metrics.queue_time)
        end = track[-1]
        assert end["name"] == "finished"
        assert end["args"]["finish reason"] == output.finish_reason
        assert end["args"]["cached tokens"] == output.cached_tokens
        assert end["ts"] - spans[0]["ts"] == pytest.approx(1e6 * output.metrics.e2e_latency)
    assert outputs[-1].cached_tokens > 0
    assert len(track_of(entries, outputs[4].request_id)) > 5  # in several pieces
    steps = [entry for entry in entries if entry["name"] == "step"]
    assert len(steps) == stats.num_steps
    assert sum(step["args"]["tokens"] for step in steps) == stats.num_batched_tokens
    for name in ("requests", "blocks in use", "tokens in step"):
        assert len([e for e in entries if e["ph"] == "C" and e["name"] == name]) == stats.num_steps


def test_preempted_requests(tmp_path):
    """They have a span from the loss of their blocks until they run again, and what is not in the pool is computed again."""
    with batching(num_blocks=14, max_num_seqs=4) as batcher:
        trace = batcher.observe(ChromeTrace())
        outputs = run_with_preemptions(batcher)
    entries = read(trace, tmp_path)
    for output in outputs:
        names = [entry["name"] for entry in track_of(entries, output.request_id) if entry["ph"] == "X"]
        again = ["preempted", "decode"] * output.metrics.num_preemptions
        assert [name for name in names if name != "prefill"] == ["queued", "decode", *again]
    assert any(entry["name"] == "prefill" and entry["args"]["again"] for entry in entries)


def test_every_end(tmp_path):
    """Cancelled, failed, late and rejected requests have a track, too, with the reason at its end."""
    clock = Clock()
    with batching(clock=clock) as batcher:
        trace = batcher.observe(ChromeTrace())
        outputs = run_to_every_end(batcher, clock)
    entries = read(trace, tmp_path)
    for output in outputs:
        assert track_of(entries, output.request_id)[-1]["args"]["finish reason"] == output.finish_reason


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_beams_lie_in_one_track(name, tmp_path):
    """All sequences of a request are one track, also where they are computed again."""
    with batching(name, num_blocks=60, max_num_seqs=8) as batcher:
        trace = batcher.observe(ChromeTrace())
        handles = submit_all(batcher, [prompt(9, 1), prompt(9, 2)], num_beams=3, max_new_tokens=12)
        for _ in range(4):
            batcher.step()
        batcher._engine.reports.preempted(batcher._engine.scheduler.preempt(), batcher._engine._clock())
        outputs = run(batcher, handles)
    assert sorted(output.metrics.num_preemptions for output in outputs) == [0, 1]
    read(trace, tmp_path)


def test_spans_never_overlap(tmp_path):
    """Where a step is taken back and a prompt computed again without a preemption, the decode span ends there."""
    trace = ChromeTrace()
    trace(Queued(0.0, "one", 5, 5, 1, 0, None))
    trace(Prefilled(2.0, "one", 1.0, 0, 5, False))
    trace(Generated(2.0, "one", 1, True, 2.0))
    trace(Prefilled(4.0, "one", 3.0, 0, 6, True))
    trace(Generated(4.0, "one", 1, False, 2.0))
    track = track_of(read(trace, tmp_path), "one")
    spans = [(e["name"], e["ts"], e["dur"]) for e in track if e["ph"] == "X"]
    assert spans == [
        ("queued", 0, 1e6), ("prefill", 1e6, 1e6), ("decode", 2e6, 1e6), ("prefill", 3e6, 1e6), ("decode", 4e6, 0),
    ]  # fmt: skip


def test_memory_is_bounded(tmp_path):
    """The oldest events go, the trace says how many, and what is left is still a trace."""
    with batching() as batcher:
        all_events, some = batcher.observe(ChromeTrace()), batcher.observe(ChromeTrace(max_events=20))
        run(batcher, submit_all(batcher))
    assert len(some) == 20
    assert some.num_dropped == len(all_events) - 20 > 0
    assert some.events == all_events.events[-20:]
    read(some, tmp_path)
    assert some.as_dict()["otherData"]["dropped_events"] == some.num_dropped
    assert "20 events" in repr(some)
    some.clear()
    assert (len(some), some.num_dropped, some.for_request("request-0")) == (0, 0, [])
    assert read(some, tmp_path)
    with pytest.raises(InvalidRequestError, match="max_events=0"):
        ChromeTrace(max_events=0)


def test_events_of_one_request():
    """Those of the request, in order, and of no other."""
    trace = ChromeTrace()
    events = [Queued(0.0, "a", 5, 5, 1, 0, None), Preempted(1.0, "b", 1), Generated(2.0, "a", 1, True, 2.0)]
    for event in events:
        trace(event)
    assert trace.for_request("a") == [events[0], events[2]]
    assert not [event for event in trace.for_request("b") if type(event) is Finished]
