"""Copying is compared with computing, as measured."""

import pytest

from paged_cache.memory.manager import BlockManager
from paged_cache.memory.offload import LONG_STEP
from paged_cache.memory.offload_costs import ENOUGH, REMEMBERED, RETRY_SECONDS, OffloadCosts, Stopwatch
from tests.memory.fake_storage import FakeStorage, new_row


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def copied(costs: OffloadCosts, seconds_per_block: float) -> None:
    """As many copies as are believed."""
    for num_blocks in range(1, REMEMBERED + 1):
        costs.observe_copy(num_blocks, num_blocks * seconds_per_block)


def computed(costs: OffloadCosts, seconds_per_token: float) -> None:
    """As many forwards as are believed."""
    for num_tokens in range(100, 100 + REMEMBERED):
        costs.observe_forward(num_tokens, num_tokens * seconds_per_token)


def test_what_is_not_measured_is_done(clock: Clock) -> None:
    """Without both measurements copies are made: that is how they are measured."""
    costs = OffloadCosts(16, clock)
    assert costs.pays_saving()
    assert costs.pays_restoring(100, 1)

    copied(costs, 1e9)
    assert costs.pays_saving()
    other = OffloadCosts(16, clock)
    computed(other, 1e-12)
    assert other.pays_saving()
    assert other.pays_restoring(100, 1)


@pytest.mark.parametrize(
    ("seconds_per_block", "saves", "restores"), [(0.007, True, True), (0.009, False, True), (0.017, False, False)]
)
def test_both_sides_of_break_even(clock: Clock, seconds_per_block: float, saves: bool, restores: bool) -> None:
    """Of 16 tokens of 1 ms each, a copy out and back may take 16 ms together; one that is out already may take them alone."""
    costs = OffloadCosts(16, clock)
    computed(costs, 0.001)
    copied(costs, seconds_per_block)

    assert costs.seconds_per_block == pytest.approx(seconds_per_block)
    assert costs.seconds_per_token == pytest.approx(0.001)
    assert costs.pays_saving() is saves
    assert costs.pays_restoring(5, 5 * 16) is restores
    assert costs.pays_restoring(5, 10 * 5 * 16)
    assert not costs.pays_restoring(5, 1)


def test_a_wrong_measurement_does_not_last(clock: Clock) -> None:
    """Copies that took far too long stop copies for a while; then some are made, and their times alone count."""
    costs = OffloadCosts(16, clock)
    computed(costs, 0.001)
    copied(costs, 5.0)
    assert not costs.pays_saving()

    clock.now += RETRY_SECONDS - 0.1
    assert not costs.pays_saving()
    clock.now += 0.2
    assert costs.pays_saving()
    assert costs.pays_restoring(1, 1)
    copied(costs, 0.001)
    assert costs.pays_saving()
    assert costs.seconds_per_block == pytest.approx(0.001)


def test_a_few_outliers_do_not_count(clock: Clock) -> None:
    """Before there are enough measurements none is believed, and one in three may be wrong by any factor."""
    costs = OffloadCosts(16, clock)
    computed(costs, 0.001)
    costs.observe_forward(100, 60.0)  # compiled
    for number in range(REMEMBERED):
        costs.observe_copy(1, 1000.0 if number % 3 == 0 else 0.001)
        assert costs.pays_saving()
        assert (costs.seconds_per_block is None) is (number + 1 < ENOUGH)
    copied(costs, 1.0)
    assert not costs.pays_saving()


def test_measurements_fade(clock: Clock) -> None:
    """What changed for good is believed after some measurements, without a pause."""
    costs = OffloadCosts(16, clock)
    computed(costs, 0.001)
    copied(costs, 0.1)
    assert not costs.pays_saving()
    for _ in range(REMEMBERED):
        clock.now += 1
        costs.observe_copy(10, 0.01)
    assert costs.pays_saving()


def make(clock: Clock, copy_seconds: float) -> tuple[BlockManager, FakeStorage]:
    """A pool of 8 blocks of 16 tokens and as many in host memory; each copy takes so long on the clock."""
    manager = BlockManager(8, 16, [None], num_host_blocks=8)
    storage, host = FakeStorage(manager), manager.host
    host.stopwatch = Stopwatch(clock)
    host.costs._clock = clock

    def slow(copy):
        def run(pairs: list) -> None:
            clock.now += copy_seconds * len(pairs)
            copy(pairs)

        return run

    host.on_save, host.on_load = slow(host.on_save), slow(host.on_load)
    return manager, storage


def serve(manager: BlockManager, storage: FakeStorage, clock: Clock, token: int, seconds: float) -> int:
    """A prompt of 100 tokens comes and goes; returns how many of them were known."""
    row, prompt = new_row(manager), [token] * 112
    found = manager.match(row.sequence, prompt, 96)
    manager.take_prefix(row.sequence, prompt, found)
    row.append(prompt[:found])
    step = storage.extend([row], [prompt[found:]])
    clock.now += seconds * (112 - found)
    storage.write(step)
    storage.commit(step)
    manager.check()
    manager.release(row.sequence)
    return found


@pytest.mark.parametrize(("copy_seconds", "pays"), [(0.0001, True), (1.0, False)])
def test_steps_and_copies_are_measured(clock: Clock, copy_seconds: float, pays: bool) -> None:
    """A pool times its long steps and its copies, and stops making copies that cost more than they save."""
    manager, storage = make(clock, copy_seconds)
    host = manager.host
    assert LONG_STEP <= 112
    for token in (1, 2, 3, 4, 5, 6, 7, 8, 9, 7):
        found = serve(manager, storage, clock, token, 0.001)

    assert host.costs.seconds_per_token == pytest.approx(0.001)
    assert host.counters.offloaded > 0
    if pays:
        assert host.costs.seconds_per_block == pytest.approx(copy_seconds)
        assert host.counters.not_offloaded == 0
    else:
        assert found == 0
        assert host.counters.not_offloaded > 0


def test_a_failed_step_is_not_measured(clock: Clock) -> None:
    """A forward that did not return says nothing of how long one takes."""
    manager, storage = make(clock, 0.1)
    row = new_row(manager)
    step = storage.extend([row], [[1] * 100])
    clock.now += 5
    storage.abort(step)
    storage.forward([row], [[1]])

    assert manager.host.costs.seconds_per_token is None
