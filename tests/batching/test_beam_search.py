"""Beam searches: their turns survive interrupts, their time counts from the first step, and why they end."""

import threading
import time

import pytest
import torch
from transformers import LogitsProcessorList

from paged_cache.batching import beam_search
from paged_cache.batching.beam_search import BeamSearch
from paged_cache.batching.exchange import Closed, Exchange
from paged_cache.batching.pool_memory import PoolMemory
from tests.batching.alone import alone, tiny
from tests.batching.faults import PROMPTS, batching, reasons, run

BEAMS = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
PLACES = [(PoolMemory, "select"), (PoolMemory, "fork"), (BeamSearch, "accept"), (Exchange, "ask")]


def interrupt(monkeypatch, owner, name, number, late):
    """Ctrl-C in the `number`-th call of a method, before it does anything or when it is done."""
    original, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(name)
        is_here = len(calls) == number
        if is_here and not late:
            raise KeyboardInterrupt
        result = original(self, *args)
        if is_here:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, method)
    return calls


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[name for _, name in PLACES])
@pytest.mark.parametrize(("of", "number"), [("llama", 1), ("llama", 3), ("qwen3_next", 2)])
def test_interrupts(of, number, owner, name, late, monkeypatch):
    """Ctrl-C anywhere between the question for a turn and its use: the turn is taken once, and all beams are right."""
    number = 1 if name == "fork" else number
    want = alone(tiny(of), PROMPTS[1], **BEAMS)
    calls = interrupt(monkeypatch, owner, name, number, late)
    with batching(of) as batcher:
        output = run(batcher, [batcher.submit(PROMPTS[1], **BEAMS)])[0]
    assert len(calls) > number
    assert (output.sequences, output.finish_reason) == (want, "length")


def test_interrupt_of_sampling(monkeypatch):
    """Ctrl-C before the loop was asked for the first time: random numbers outside are left alone, the beams' are not drawn twice."""
    options = {**BEAMS, "do_sample": True, "seed": 4}
    want = alone(tiny("llama"), PROMPTS[1], **options)
    interrupt(monkeypatch, Exchange, "ask", 1, late=False)
    torch.manual_seed(11)
    with batching() as batcher:
        handle = batcher.submit(PROMPTS[1], **options)
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            batcher.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert run(batcher, [handle])[0].sequences == want


def test_waiting_is_no_part_of_max_time():
    """`max_time` counts from the first step, not from `submit`."""
    with batching() as batcher:
        handle = batcher.submit(PROMPTS[1], **BEAMS, max_time=0.3)
        time.sleep(0.4)
        output = run(batcher, [handle])[0]
    assert (output.finish_reason, len(output.generated_tokens)) == ("length", 8)


def test_max_time():
    """A search that `max_time` cuts says so."""

    def slow(input_ids, scores):
        time.sleep(0.05)
        return scores

    with batching() as batcher:
        handle = batcher.submit(PROMPTS[1], **BEAMS, max_time=0.08, logits_processor=LogitsProcessorList([slow]))
        output = run(batcher, [handle])[0]
    assert output.finish_reason == "timeout"
    assert 0 < len(output.generated_tokens) < 8


def test_reasons():
    """Beams that end with an end-of-sequence token are stopped, the others are at their full length."""
    options = {**BEAMS, "max_new_tokens": 30, "eos_token_id": list(range(20, 70))}
    with batching() as batcher:
        handles = [batcher.submit(PROMPTS[1], **each) for each in (options, BEAMS, {**options, "max_time": 60.0})]
        outputs = run(batcher, handles)
    assert reasons(outputs) == ["stop", "length", "stop"]
    assert outputs[0].generated_tokens[-1] in options["eos_token_id"]


def test_a_loop_that_hangs(monkeypatch):
    """A search that takes too long for a token fails, and nobody else does."""
    monkeypatch.setattr(beam_search, "PATIENCE", 0.1)
    free = threading.Event()

    def hang(input_ids, scores):
        assert free.wait(20)
        return scores

    with batching() as batcher:
        handles = [
            batcher.submit(PROMPTS[1], **BEAMS, logits_processor=LogitsProcessorList([hang])),
            batcher.submit(PROMPTS[0], **{**BEAMS, "num_beams": 1}),
        ]
        outputs = run(batcher, handles)
        free.set()
    assert reasons(outputs) == ["error", "length"]
    assert "longer than" in str(outputs[0].error)


def test_exchange():
    """A question that is asked again has the one answer that was given; who waits for one that does not come leaves."""
    exchange, heard, left = Exchange(), [], threading.Event()

    def loop():
        for number in range(2):
            heard.append(exchange.question(number))
            exchange.answer(number, -number)
        with pytest.raises(Closed):
            exchange.question(2)
        left.set()

    with pytest.raises(TimeoutError):
        exchange.ask(0, "a", 0.01)
    threading.Thread(target=loop, daemon=True).start()
    assert [exchange.ask(number, "ab"[number], 10) for number in (0, 0, 1, 1)] == [0, 0, -1, -1]
    exchange.close()
    assert left.wait(10)
    assert heard == ["a", "b"]
