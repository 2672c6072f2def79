"""Rows of one request that end one after the other: slots and blocks of the complete ones are for others."""

from paged_cache.batching.forecast import Forecast
from tests.batching.alone import alone, padded, prompt, tiny
from tests.batching.faults import batching, run
from tests.batching.integer_memory import IntegerMemory, make_request
from tests.batching.machine import Machine

SIX = {
    "num_return_sequences": 6,
    "do_sample": True,
    "seed": 3,
    "max_new_tokens": 60,
    "eos_token_id": list(range(30, 60)),
}


def test_complete_rows_give_their_slots_back():
    """A request that waits for slots runs as soon as rows of another are complete, not when all of them are."""
    with batching(max_num_seqs=6) as batcher:
        first = batcher.submit(prompt(9, 1), **SIX)
        second = batcher.submit(prompt(6, 1), do_sample=False, max_new_tokens=2, eos_token_id=None)
        while not second.done:
            batcher.step()
            scheduler = batcher._engine.scheduler
            assert batcher.stats().num_running_seqs == sum(request.num_live for request in scheduler.running)
        assert not first.done
        (output,) = run(batcher, [first])
        assert padded(output.sequences) == alone(tiny("llama"), prompt(9, 1), **SIX)
        assert len(set(map(len, output.sequences))) > 2
        assert batcher.stats().num_running_seqs == 0


def test_preempted_rows_come_back_without_the_complete_ones():
    """A request needs slots for its live rows only, also when it is admitted again."""
    machine = Machine(max_num_seqs=4, policy="fcfs")
    several, other = machine.add(make_request("several", 4, 30, num_rows=4), make_request("other", 4, 30))
    machine.step()
    assert machine.scheduler.running == [several]
    machine.step()
    for _ in range(2):
        machine.complete(several, several.rows[-1])
    machine.step()
    assert machine.scheduler.running == [several, other]
    assert machine.scheduler.num_running_seqs == 3
    victim = machine.scheduler.preempt()
    assert machine.scheduler.num_running_seqs == sum(r.num_live for r in (several, other) if r is not victim)
    machine.step()
    assert machine.scheduler.num_running_seqs == 3
    machine.run()
    assert machine.scheduler.num_running_seqs == 0


def test_complete_rows_grow_no_more():
    """A forecast counts the blocks that live rows will need: neither growth nor forks of complete ones."""
    memory = IntegerMemory(100)
    request = make_request("r", 8, 40, num_rows=4, expected_tokens=40)
    request.predicted_tokens = 40
    memory.compute(request.rows[0], 8)
    assert Forecast(memory, [request], 0.0)._courses[0].rate * 40 == 40
    request.num_live = 1
    course = Forecast(memory, [request], 0.0)._courses[0]
    assert (course.rate * course.num_steps, course.held) == (10, 2)
