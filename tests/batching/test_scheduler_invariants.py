"""Arbitrary arrivals, lengths, predictions, cancellations and preemptions: nothing is lost, nobody starves, blocks are conserved."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_cache.batching.request import Status
from tests.batching.integer_memory import make_request
from tests.batching.machine import Machine

NUM_BLOCKS, BLOCK_SIZE, SLOTS, BUDGET = 24, 4, 5, 16
POLICIES = ["fcfs", "sjf", "sjf-no-aging", "hrrn"]
ADAPTERS = [None, "__base__", "a", "b", "c"]
PREDICTIONS = {
    "none": lambda true, limit: None,
    "oracle": lambda true, limit: true,
    "reversed": lambda true, limit: limit - true,
    "all short": lambda true, limit: 1,
    "all long": lambda true, limit: 1e9,
}


class Serving(RuleBasedStateMachine):
    """An engine that anything happens to."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        max_displacement=st.sampled_from([None, 0, 3]),
        whole_prompts=st.booleans(),
        max_chunk=st.sampled_from([None, 1, 5]),
        headroom=st.sampled_from([0.02, -1.0]),  # the latter admits far too many
        max_loras=st.sampled_from([None, 1, 2]),
    )
    def start(self, max_displacement, **options):
        self.machine = Machine(NUM_BLOCKS, BLOCK_SIZE, SLOTS, BUDGET, max_displacement=max_displacement, **options)
        self.whole_prompts, self.requests, self.cancelled = options["whole_prompts"], [], []
        self.max_loras = options["max_loras"]

    @rule(
        shapes=st.lists(
            st.tuples(
                st.integers(1, 30),
                st.integers(1, 25),
                st.integers(1, 3),
                st.integers(0, 1),
                st.integers(0, 40),
                st.sampled_from(ADAPTERS),
            ),
            min_size=1,
            max_size=6,
        ),
        prediction=st.sampled_from(sorted(PREDICTIONS)),
    )
    def arrive(self, shapes, prediction):
        new = []
        for num_prompt, num_new, num_rows, priority, num_cached, adapter_name in shapes:
            num_rows = num_rows if num_rows * -(-(num_prompt + num_new) // BLOCK_SIZE) <= NUM_BLOCKS else 1
            name, expected = f"{len(self.requests) + len(new)}", PREDICTIONS[prediction](num_new, 25)
            self.machine.memory.prefixes[name] = num_cached
            options = {"num_rows": num_rows, "priority": priority, "adapter_name": adapter_name}
            new.append(make_request(name, num_prompt, num_new, expected_tokens=expected, **options))
        self.requests += self.machine.add(*new)

    @rule(times=st.integers(1, 8), budget=st.sampled_from([None, None, 1, 7]))
    def step(self, times, budget):
        for _ in range(times):
            is_busy = self.machine.scheduler.num_running + self.machine.scheduler.num_waiting > 0
            plan = self.machine.step(budget)
            num_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
            assert num_tokens <= (budget or BUDGET) or self.whole_prompts
            assert len({id(chunk.row) for chunk in plan.chunks}) == len(plan.chunks)
            assert bool(plan.chunks) == is_busy
            assert not (plan.admitted and plan.preempted)

    @rule(data=st.data())
    @precondition(lambda self: any(request.status is not Status.FINISHED for request in self.requests))
    def cancel(self, data):
        alive = [request for request in self.requests if request.status is not Status.FINISHED]
        request = data.draw(st.sampled_from(alive))
        self.machine.scheduler.remove(request)
        self.cancelled.append(request)

    def several_rows(self):
        """Running requests whose rows just got a token each: then some may be complete."""
        several = [request for request in self.machine.scheduler.running if len(request.rows) > 1]
        return [r for r in several if all(row.num_tokens - row.num_computed == 1 for row in r.rows)]

    @rule(data=st.data())
    @precondition(lambda self: self.several_rows())
    def complete_a_row(self, data):
        request = data.draw(st.sampled_from(self.several_rows()))
        self.machine.complete(request, data.draw(st.sampled_from(request.rows)))
        assert request.num_live == len(request.rows)

    @rule()
    def preempt(self):
        before = self.machine.scheduler.num_running
        victim = self.machine.scheduler.preempt()
        assert (victim is not None) == (before > 1)

    @rule()
    def wait(self):
        self.machine.now += 5.0

    @invariant()
    def blocks_are_conserved(self):
        rows = [row for request in self.requests for row in request.rows]
        assert self.machine.memory.num_free + sum(row.num_blocks for row in rows) == NUM_BLOCKS
        scheduler = self.machine.scheduler
        running = [request for request in self.requests if request.status is Status.RUNNING]
        waiting = [request for request in self.requests if request.status is Status.WAITING]
        assert sorted(map(id, running)) == sorted(map(id, scheduler.running))
        assert sorted(map(id, waiting)) == sorted(map(id, scheduler.waiting))
        assert sum(request.num_live for request in running) == scheduler.num_running_seqs <= SLOTS
        assert all(row.num_blocks == 0 for request in waiting for row in request.rows)
        assert self.max_loras is None or len({r.adapter_name for r in running} - {None, "__base__"}) <= self.max_loras

    def teardown(self):
        """Everything ends, and the memory is whole."""
        if not hasattr(self, "machine"):
            return
        self.machine.run()
        assert {*self.machine.ended, *self.cancelled} == {*self.requests}
        assert self.machine.memory.num_free == NUM_BLOCKS


TestServing = Serving.TestCase
TestServing.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

JOBS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=50)


@pytest.mark.parametrize("policy", ["sjf", "hrrn", "fcfs"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@settings(max_examples=15, deadline=None)
@given(jobs=JOBS, max_displacement=st.integers(0, 10))
def test_the_bound_holds_whatever_is_predicted(policy, prediction, jobs, max_displacement):
    """Request i is among the first i + B + 1 that are admitted; preempted ones count once."""
    machine = Machine(24, 4, 3, 16, policy=policy, max_displacement=max_displacement)
    for i, (num_prompt, num_new, num_steps) in enumerate(jobs):
        machine.add(make_request(i, num_prompt, num_new, expected_tokens=PREDICTIONS[prediction](num_new, 20)))
        for _ in range(num_steps):
            machine.step()
    machine.run()

    first = list(dict.fromkeys(machine.admitted))
    assert len(first) == len(jobs)
    assert all(place <= int(request.request_id) + max_displacement for place, request in enumerate(first))


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 9), st.sampled_from("aaaab")),
        min_size=1,
        max_size=50,
    ),
    max_loras=st.integers(1, 2),
    max_displacement=st.integers(0, 10),
)
def test_a_rare_adapter_does_not_starve(jobs, max_loras, max_displacement):
    """The bound holds although requests of an adapter that runs may pass those that wait for another one to go."""
    machine = Machine(24, 4, 3, 16, max_displacement=max_displacement, max_loras=max_loras)
    for i, (num_prompt, num_new, num_steps, adapter_name) in enumerate(jobs):
        machine.add(make_request(i, num_prompt, num_new, adapter_name=adapter_name))
        for _ in range(num_steps):
            machine.step()
            running = {request.adapter_name for request in machine.scheduler.running}
            assert len(running) <= max_loras
    machine.run()

    first = list(dict.fromkeys(machine.admitted))
    assert len(first) == len(jobs)
    assert all(place <= int(request.request_id) + max_displacement for place, request in enumerate(first))


def test_others_run_while_an_adapter_waits_for_its_place():
    """Requests of the adapter that runs pass those of another one, as far as the bound allows, and no slot is idle."""
    machine = Machine(max_num_seqs=4, max_displacement=6, max_loras=1)
    machine.add(*(make_request(f"a{i}", 4, 8, adapter_name="a") for i in range(2)))
    machine.step()
    machine.add(*(make_request(f"b{i}", 4, 2, adapter_name="b") for i in range(8)))
    machine.add(*(make_request(f"late{i}", 4, 30, adapter_name="a") for i in range(9)))
    machine.step()
    assert machine.scheduler.num_running_seqs == 4
    machine.run()
    order = [request.request_id for request in machine.admitted]
    assert order[2:4] == ["late0", "late1"]
    assert order.index("b0") <= 2 + 6
    assert len(order) == 19


def test_plain_shortest_first_starves_and_the_default_does_not():
    """Short requests that keep coming hold a long one back for ever, or for as many admissions as are allowed."""
    places = {}
    for policy in ("sjf-no-aging", "sjf"):
        machine = Machine(policy=policy, max_num_seqs=1, max_displacement=8 if policy == "sjf" else None)
        machine.add(make_request("first", 4, 4))
        machine.add(make_request("long", 40, 40))
        for i in range(60):
            machine.add(make_request(i, 4, 4))
            for _ in range(4):
                machine.step()
        machine.run()
        places[policy] = [request.request_id for request in machine.admitted].index("long")

    assert places["sjf-no-aging"] > 50
    assert places["sjf"] <= 1 + 8
