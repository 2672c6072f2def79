"""Who runs, who waits, who loses its blocks: on blocks that are numbers and a clock that is set by hand."""

import time

import pytest

from paged_cache.batching.policy import Policy
from paged_cache.batching.request import Status
from paged_cache.errors import InvalidRequestError
from tests.batching.integer_memory import make_request
from tests.batching.machine import Machine, names


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "sjf-no-aging", "hrrn"])
def test_everything_ends_and_the_blocks_come_back(policy):
    """Each request is admitted once and ends; memory is whole again."""
    machine = Machine(policy=policy, num_blocks=40)
    requests = machine.add(*(make_request(i, 1 + 7 * i % 23, 1 + 5 * i % 17) for i in range(50)))
    machine.run()

    assert sorted(names(machine.ended)) == sorted(names(requests))
    assert machine.memory.num_free == 40
    assert all(request.status is Status.FINISHED for request in requests)
    assert machine.scheduler.stats[:6] == (50, 50, machine.scheduler.stats.num_preemptions, 0, 0, 0)


def test_a_step_has_decodes_first_and_keeps_to_the_budget():
    """Rows with one token to go, then running prompts, then new ones, cut to what the budget leaves."""
    machine = Machine(policy="fcfs", max_num_batched_tokens=10)
    short, long, last = machine.add(
        make_request("short", 3, 9), make_request("long", 14, 2), make_request("last", 30, 2)
    )

    plans = [[(chunk.request, chunk.num_tokens) for chunk in machine.step().chunks] for _ in range(3)]
    assert plans == [[(short, 3), (long, 7)], [(short, 1), (long, 7), (last, 2)], [(short, 1), (long, 1), (last, 8)]]
    assert [chunk.request for chunk in machine.memory.expected] == [short, long, long, last, last]
    assert sum(chunk.num_tokens for chunk in machine.step(budget=4).chunks) == 4


def test_chunks_have_a_limit():
    """`max_chunk` tokens of a prompt in a step, whatever the budget."""
    machine = Machine(max_chunk=5)
    machine.add(make_request("a", 12, 1))

    assert [machine.step().chunks[0].num_tokens for _ in range(3)] == [5, 5, 2]


def test_whole_prompts_come_in_one_piece():
    """As many prompts as the budget allows and at least one, decodes beside them."""
    machine = Machine(whole_prompts=True, max_num_batched_tokens=10, policy="fcfs")
    machine.add(make_request("a", 6, 9), make_request("b", 5, 9), make_request("c", 40, 9))

    plans = [[(chunk.request.request_id, chunk.num_tokens) for chunk in machine.step().chunks] for _ in range(3)]
    assert plans == [[("a", 6)], [("a", 1), ("b", 5)], [("a", 1), ("b", 1), ("c", 40)]]


def test_rows_are_slots():
    """A request with several rows waits until all of them find a slot, and holds them."""
    machine = Machine(max_num_seqs=4, policy="fcfs")
    machine.add(make_request("a", 4, 5, num_rows=3), make_request("b", 4, 3, num_rows=2), make_request("c", 4, 3))

    assert names(machine.step().admitted) == ["a"]
    assert len(machine.step().chunks) == machine.scheduler.num_running_seqs == 3
    machine.run()
    assert names(machine.admitted) == ["a", "b", "c"]
    with pytest.raises(InvalidRequestError, match="num_rows=5"):
        machine.add(make_request("d", num_rows=5))


def test_priorities_are_strict():
    """A lower number goes first, whatever its length; within one priority the policy decides."""
    machine = Machine(max_num_seqs=1)
    machine.add(make_request("b", 4, 2, priority=1), make_request("a", 4, 9, priority=1), make_request("z", 60, 60))
    machine.run()

    assert names(machine.admitted) == ["z", "b", "a"]


def test_own_policies():
    """A key is all that a policy needs; one that is no number is refused."""

    class Last(Policy):
        def key(self, request, outlook):
            return float("nan") if request.tenant else -float(request.request_id)

    machine = Machine(policy=Last(), max_num_seqs=1)
    machine.add(*map(make_request, range(5)))
    machine.run()

    assert names(machine.admitted) == ["4", "3", "2", "1", "0"]
    with pytest.raises(InvalidRequestError, match="key nan"):
        machine.add(make_request(7, tenant="x"))
    with pytest.raises(InvalidRequestError, match="'sjf', 'fcfs', 'sjf-no-aging', 'hrrn'"):
        Machine(policy="srpt")


def test_shortest_first():
    """By default, short requests overtake long ones that arrived a moment before."""
    machine = Machine(max_num_seqs=1)
    machine.add(make_request("long", 60, 90), make_request("middle", 30, 30), make_request("short", 4, 4))
    machine.run()

    assert names(machine.admitted) == ["short", "middle", "long"]


def test_blocks_are_kept_for_an_overdue_one():
    """What does not fit is passed over as often as its displacement allows; then all others wait until it runs."""
    machine = Machine(num_blocks=10, max_num_seqs=8, max_displacement=2, policy="fcfs", headroom=0)
    machine.add(make_request("running", 4, 30), make_request("large", 24, 8))
    machine.add(*(make_request(f"small {i}", 4, 1) for i in range(5)))
    machine.run()

    assert names(machine.admitted)[:4] == ["running", "small 0", "small 1", "large"]


def test_nobody_of_a_later_priority_fills_in():
    """As long as somebody of a more urgent priority waits for blocks, the others wait as well."""
    machine = Machine(num_blocks=10, max_num_seqs=8, headroom=0)
    machine.add(make_request("running", 4, 30, priority=0))
    machine.step()
    machine.add(make_request("large", 24, 8, priority=1), make_request("small", 4, 1, priority=2))
    machine.run()

    assert names(machine.admitted) == ["running", "large", "small"]


def test_admission_foresees_the_peak():
    """Two requests that will need all blocks at different times run together; two that need them at once do not."""
    machine = Machine(num_blocks=10, policy="fcfs", headroom=0)
    machine.add(make_request("a", 12, 8), make_request("b", 12, 8))
    assert names(machine.step().admitted) == ["a", "b"]  # 5 blocks each at the end
    machine = Machine(num_blocks=10, policy="fcfs", headroom=0)
    machine.add(make_request("a", 12, 24), make_request("b", 12, 24))
    assert names(machine.step().admitted) == ["a"]  # 9 blocks each
    assert machine.run().scheduler.stats.num_preemptions == 0


def test_cached_tokens_are_not_computed():
    """A request that finds its prefix has less to compute, and its blocks count once where others hold them."""
    machine = Machine(prefixes={"a": 32})
    machine.add(make_request("a", 40, 2))

    assert [chunk.num_tokens for chunk in machine.step().chunks] == [8]


def test_who_is_alone_is_admitted():
    """If nothing runs, a request that fits exactly is admitted, though its prefix fills nearly all blocks already."""
    machine = Machine(num_blocks=6, prefixes={"a": 23})
    machine.add(make_request("a", 24, 1))

    assert names(machine.run().ended) == ["a"]


def test_prompts_that_fill_the_memory_give_way():
    """Where halves of prompts hold all blocks, the last one by key loses its own."""
    machine = Machine(num_blocks=8, max_num_batched_tokens=8, policy="fcfs", headroom=-1)
    machine.add(make_request("a", 28, 2), make_request("b", 28, 2))
    machine.run()

    assert names(machine.ended) == ["a", "b"]


def test_a_refusal_is_not_asked_for_again_and_again():
    """While blocks only become fewer, nobody is looked at a second time; a request that ends changes that."""
    machine = Machine(num_blocks=10, headroom=0)
    looked = []
    machine.memory.look = lambda request, look=machine.memory.look: looked.append(request) or look(request)
    machine.add(make_request("a", 12, 20))
    machine.step()
    machine.add(make_request("b", 12, 20))
    for _ in range(10):
        machine.step()
    assert names(looked) == ["a", "b"]
    machine.run()
    assert names(machine.ended) == ["a", "b"]


def test_what_is_coming_is_waited_for():
    """A prompt whose prefix is computed in this step is passed over until the next one; others go before it."""
    machine = Machine(policy="fcfs", max_displacement=9)
    machine.memory.coming = {"b"}
    machine.add(*map(make_request, "abc"))

    assert names(machine.step().admitted) == ["a", "c"]
    machine.memory.coming.clear()
    assert names(machine.step().admitted) == ["b"]


def test_too_few_blocks_take_the_last_key():
    """Who has the largest key loses its blocks, waits at its key, and runs on later; the number of admissions counts it once."""
    machine = Machine(num_blocks=8, policy="fcfs", headroom=0)
    first, second = make_request("a", 8, 20, expected_tokens=1), make_request("b", 8, 12, expected_tokens=1)
    machine.add(first, second)
    machine.run()

    assert first.num_preemptions == 0 < second.num_preemptions
    assert names(machine.ended) == ["a", "b"]
    assert machine.scheduler.stats.num_admitted == 2


def test_cancelled_ones_leave_at_once():
    """A request can be removed while it waits, runs or is over."""
    machine = Machine(max_num_seqs=1)
    waiting, running = machine.add(make_request("w", 9, 9), make_request("r", 3, 3))
    machine.step()
    machine.scheduler.remove(waiting)
    machine.scheduler.remove(running)
    machine.scheduler.remove(running)

    assert (machine.scheduler.num_waiting, machine.scheduler.num_running, machine.memory.num_free) == (0, 0, 1000)
    assert not machine.step().chunks


def test_the_last_one_is_not_preempted():
    """Somebody always runs on."""
    machine = Machine()
    assert machine.scheduler.preempt() is None
    machine.add(make_request("a"))
    machine.step()
    assert machine.scheduler.preempt() is None


def test_a_small_budget_is_no_refusal():
    """Who was not admitted because a step had fewer tokens than usual is admitted in the next one."""
    machine = Machine(max_num_seqs=4)
    machine.add(make_request("a", 1, 50))
    machine.step()
    machine.add(make_request("b", 8, 2))

    assert [chunk.request.request_id for chunk in machine.step(budget=1).chunks] == ["a"]
    assert names(machine.step().admitted) == ["b"]


def test_a_memory_that_fails_loses_nobody():
    """If admission raises, everybody still waits, in the same order."""
    machine = Machine(policy="fcfs", max_displacement=9, max_num_seqs=2)
    machine.memory.coming = {"a"}
    machine.add(*map(make_request, "abc"))
    admit = machine.memory.admit
    machine.memory.admit = lambda request: 1 / 0
    with pytest.raises(ZeroDivisionError):
        machine.step()
    machine.memory.admit = admit
    machine.memory.coming = set()

    assert names(machine.step().admitted) == ["a", "b"]


def test_decoding_is_cheap():
    """With 32 rows and 1,000 waiting, a step takes far less than a tenth of a millisecond; the bound is generous."""
    machine = Machine(10**6, 16, max_num_seqs=32, max_num_batched_tokens=10**4)
    machine.add(*(make_request(i, 10, 10**6, expected_tokens=i % 97 + 1) for i in range(1032)))
    for _ in range(4):
        machine.step()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        plan = machine.scheduler.schedule()
        times.append(time.perf_counter() - start)

    assert len(plan.chunks) == 32
    assert min(times) < 2e-4  # about 10 us on an idle machine


def test_more_waiting_does_not_cost_more():
    """With a hundred times as many waiting, admitting takes less than five times as long."""
    fastest = {}
    for num_waiting in (300, 30_000):
        machine = Machine(10**6, 16, max_num_seqs=8, max_num_batched_tokens=10**4)
        for i in range(num_waiting):
            machine.add(make_request(i, 10, 10**6, expected_tokens=i * 7919 % 9973 + 1))
        machine.step()
        times = []
        for _ in range(100):
            machine.scheduler.remove(machine.scheduler.running[0])
            start = time.perf_counter()
            plan = machine.step()
            times.append(time.perf_counter() - start)
            assert len(plan.admitted) == 1
        fastest[num_waiting] = min(times)

    assert fastest[30_000] < 5 * fastest[300]
