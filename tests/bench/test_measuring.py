"""How everything is measured: in turns, right before fast."""

import gc
import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest

from paged_cache.bench import measuring
from paged_cache.bench.measuring import Sample, Wrong, WrongAnswerError, alternate, bundle, measure, same
from paged_cache.bench.results import Line

CASE = {"batch": 2}


@dataclass
class Somebody:
    """A candidate who notes when it was its turn; answers and errors come from a list, the last one again and again."""

    name: str
    log: list[str]
    answers: list[Any] = field(default_factory=lambda: ["right"])
    metrics: list[dict[str, float]] = field(default_factory=list)
    count: int = 0

    def run(self):
        self.log.append(self.name)
        answer = self.answers[min(self.count, len(self.answers) - 1)]
        metrics = self.metrics[self.count] if self.metrics else {"elapsed_s": float(self.count)}
        self.count += 1
        if isinstance(answer, Exception):
            raise answer
        return Sample(answer, metrics)


@pytest.fixture
def log():
    """Names, in the order of their turns."""
    return []


def test_candidates_take_turns(log):
    """Every other round starts with the last candidate; the warm-up is not timed."""
    lines = measure([Somebody(name, log) for name in "abc"], ["c"], CASE, rounds=3, warm_up=1)

    assert "".join(log) == "abccbaabccba"
    assert lines == [Line(CASE, name, {"elapsed_s": [1.0, 2.0, 3.0]}) for name in "abc"]


def test_no_warm_up(log):
    """The reference comes first even so."""
    lines = measure([Somebody(name, log) for name in "ab"], [], CASE, rounds=2, warm_up=0)

    assert "".join(log) == "abba"
    assert lines[0].metrics == {"elapsed_s": [0.0, 1.0]}


def test_a_known_answer_is_the_reference(log):
    """The first candidate is checked, too, where the right answer is known before."""
    with pytest.raises(WrongAnswerError, match="a: got 'right' instead of 'other'"):
        measure([Somebody("a", log)], ["a"], CASE, answer="other")


def test_collections_between_runs_are_short(log, monkeypatch):
    """What was there before is left out of them, and is collected again afterwards; one inside another does nothing."""
    monkeypatch.setattr(measuring.gc, "get_freeze_count", lambda: log.count("freeze") - log.count("unfreeze"))
    monkeypatch.setattr(measuring.gc, "freeze", lambda: log.append("freeze"))
    monkeypatch.setattr(measuring.gc, "unfreeze", lambda: log.append("unfreeze"))
    with measuring.settled_heap():
        for _ in range(2):
            measure([Somebody("a", log)], [], CASE, rounds=1)
    with pytest.raises(WrongAnswerError):
        measure([Somebody("a", log)], ["a"], CASE, answer="other")

    assert log == ["freeze", "a", "a", "a", "a", "unfreeze", "freeze", "a", "unfreeze"]


def test_every_turn_ticks(log):
    """Before each run, with the candidate's name: what a progress bar needs."""
    ticks = []
    measure(
        [Somebody(name, log) for name in "ab"], [], CASE, rounds=2, tick=lambda name: ticks.append((name, len(log)))
    )

    assert ticks == [(name, number) for number, name in enumerate("abbaab")]


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_a_wrong_peer_gets_a_note(log, turn):
    """Whether in the warm-up or in a later round: no samples, a note, no further turn, and the others go on."""
    peer = Somebody("b", log, ["right"] * turn + ["wrong"])
    lines = measure([Somebody("a", log), peer, Somebody("c", log)], ["c"], CASE, rounds=3)

    assert lines[1] == Line(CASE, "b", {}, "WRONG: got 'wrong' instead of 'right'")
    assert [len(line.metrics["elapsed_s"]) for line in (lines[0], lines[2])] == [3, 3]
    assert log.count("b") == turn + 1


def test_a_peer_that_fails_gets_a_note(log):
    """The first line of its error is the note; a reference that fails later is a peer like the others."""
    peers = [Somebody("a", log, ["right", "right", RuntimeError("out of memory\nmore")]), Somebody("b", log)]
    lines = measure([*peers, Somebody("c", log)], ["c"], CASE, rounds=3)

    assert lines[0] == Line(CASE, "a", {}, "RuntimeError: out of memory")
    assert len(lines[2].metrics["elapsed_s"]) == 3


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_ours_must_be_right(log, turn):
    """A wrong answer of ours ends the measurement, in the warm-up as in any round."""
    ours = Somebody("ours", log, ["right"] * turn + ["wrong"])

    with pytest.raises(WrongAnswerError, match="ours: got 'wrong' instead of 'right'"):
        measure([Somebody("a", log), ours], ["ours"], CASE, rounds=3)
    assert log.count("ours") == turn + 1


def test_ours_must_not_fail(log):
    """Its own error is raised, not a note written."""
    with pytest.raises(ZeroDivisionError):
        measure([Somebody("a", log), Somebody("ours", log, [ZeroDivisionError()])], ["ours"], CASE)


def test_without_a_reference_nothing_is_measured(log):
    """If the first candidate fails in its first run its error is raised, peer or not."""
    with pytest.raises(MemoryError):
        measure([Somebody("a", log, [MemoryError()]), Somebody("b", log)], [], CASE)


def test_an_empty_answer_is_an_answer(log):
    """A reference that finds nothing is compared like any other."""
    lines = measure([Somebody("a", log, [[]]), Somebody("b", log, [[1]])], [], CASE)

    assert lines[1].note == "WRONG: got [1] instead of []"


def test_checks_of_ones_own(log):
    """They get an answer and the reference's first one, and say themselves what is wrong."""
    seen = []

    def near(found, expected):
        seen.append((found, expected))
        if abs(found - expected) > 1:
            raise Wrong("too far")

    answers = ([1.0, 1.5], [1.9], [9.0])
    people = [Somebody(name, log, found) for name, found in zip("abc", answers, strict=True)]
    lines = measure(people, ["b"], CASE, rounds=1, check=near)

    assert [line.note for line in lines] == ["", "", "WRONG: too far"]
    assert {expected for _, expected in seen} == {1.0}


def test_a_long_answer_is_cut():
    """A note has room for the beginning of what was found."""
    with pytest.raises(Wrong) as caught:
        same(list(range(1000)), [1])

    assert len(str(caught.value)) < 120
    assert "..." in str(caught.value)


@pytest.mark.parametrize(("rounds", "warm_up"), [(0, 1), (3, -1)])
def test_numbers_of_rounds_are_checked(log, rounds, warm_up):
    """Before anybody runs."""
    with pytest.raises(ValueError, match=f"rounds={rounds} and warm_up={warm_up}"):
        measure([Somebody("a", log)], [], CASE, rounds=rounds, warm_up=warm_up)
    assert not log


def test_names_are_different(log):
    """Two candidates of one name would share a line."""
    with pytest.raises(ValueError, match=r"names of their own, not \['a', 'a'\]"):
        measure([Somebody("a", log), Somebody("a", log)], [], CASE)
    assert not log


def test_metrics_stay_the_same(log):
    """A metric that is missing in a round would leave samples of which nobody knows the round."""
    ours = Somebody("a", log, metrics=[{"x_s": 1.0}, {"x_s": 1.0, "y_s": 1.0}, {"x_s": 1.0}])

    with pytest.raises(ValueError, match=r"a has \['x_s'\] now, before it had \['x_s', 'y_s'\]"):
        measure([ours], ["a"], CASE)


def test_garbage_is_not_carried_over(log):
    """What one candidate left in cycles is gone when the next one runs."""
    left = []

    class Knot:
        """Refers to itself."""

        def __init__(self):
            self.me = self

    class Messy(Somebody):
        def run(self):
            left.append(weakref.ref(Knot()))
            return super().run()

    class Tidy(Somebody):
        def run(self):
            assert all(ref() is None for ref in left)
            return super().run()

    gc.disable()
    try:
        measure([Messy("a", log), Tidy("b", log)], ["b"], CASE, rounds=1)
    finally:
        gc.enable()
    assert left


def test_short_calls_alternate():
    """One round does not count, then at least five do, each begun by another one, however little time there is."""
    order = []

    def watch(name):
        order.append(name)
        return float(len(order))

    samples = alternate({name: lambda name=name: watch(name) for name in "ab"}, seconds=0)

    assert "".join(order) == "ab" + "abbaabbaab"
    assert samples == {"a": [3.0, 6.0, 7.0, 10.0, 11.0], "b": [4.0, 5.0, 8.0, 9.0, 12.0]}


def test_short_calls_fill_their_time(monkeypatch):
    """Rounds go on until the time is over, and neighbours are bundled."""
    clock, numbers = itertools.count(), itertools.count()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    samples = alternate({"a": lambda: float(next(numbers))}, 100, most_samples=10)

    assert 100 <= next(numbers) <= 110
    assert len(samples["a"]) == 10
    assert samples["a"] == sorted(samples["a"])


def test_bundles_are_medians_of_neighbours():
    """As many as wanted at most, all of them used."""
    assert bundle([1.0, 9.0, 2.0, 3.0, 4.0, 50.0, 7.0], 3) == [2.0, 4.0, 7.0]
    assert bundle([1.0, 2.0], 50) == [1.0, 2.0]
