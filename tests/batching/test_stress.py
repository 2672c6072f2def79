"""Hundreds of random requests at once: every finished one has the tokens of `generate`, and no block is lost."""

import collections
import dataclasses
import functools
import os
import random
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paged_cache import ContinuousBatcher, OutOfBlocksError, Policy
from tests.batching.alone import MOST_STEPS, alone, padded, prompt, tiny
from tests.models import assert_whole, poisoned_pool

NUM_REQUESTS = int(os.environ.get("PAGED_CACHE_STRESS", "40"))
"""Requests of each case: set it to thousands for a long run."""

STOPS = list(range(70, 100))
SYSTEM = [prompt(30, seed) for seed in range(3)]
GREEDY = {"do_sample": False, "repetition_penalty": 5.0}
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 30}
MODES = [
    GREEDY,
    {"do_sample": False},
    SAMPLING,
    SAMPLING | {"num_return_sequences": 2},
    SAMPLING | {"num_return_sequences": 3, "top_p": 0.8},
    {"do_sample": False, "num_beams": 2},
    {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_beams": 2},
]
WEIGHTS = [6, 4, 4, 2, 1, 1, 1, 1]


class LongestPromptFirst(Policy):
    """A user's own order."""

    name = "longest prompt first"

    def key(self, request, outlook):
        """The longer, the sooner."""
        return -request.num_prompt_tokens


CASES = {
    "fcfs": {"policy": "fcfs", "num_blocks": 32, "block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "sjf": {"policy": "sjf", "num_blocks": 34, "block_size": 4, "max_num_batched_tokens": 64},
    "sjf, small steps": {
        "policy": "sjf",
        "num_blocks": 60,
        "block_size": 2,
        "max_num_batched_tokens": 3,
        "max_num_seqs": 3,
    },
    "sjf-no-aging": {"policy": "sjf-no-aging", "num_blocks": 120, "block_size": 1, "max_num_batched_tokens": 32},
    "hrrn": {"policy": "hrrn", "num_blocks": 33, "block_size": 4, "max_num_batched_tokens": 7},
    "own": {"policy": LongestPromptFirst(), "num_blocks": 9, "block_size": 16, "max_num_batched_tokens": 512},
    "nothing shared": {"num_blocks": 34, "block_size": 4, "max_num_batched_tokens": 24, "prefix_caching": False},
    "wide": {"num_blocks": 600, "block_size": 8, "max_num_batched_tokens": 256, "max_num_seqs": 64},
}


@dataclasses.dataclass
class Asked:
    """One random request, and what became of it."""

    ids: list
    options: dict
    arrival: int
    cancel_after: int | None = None
    is_too_long: bool = False
    handle: object = None
    events: list = dataclasses.field(default_factory=list)

    def submit(self, batcher):
        """Hands it in and listens."""
        self.handle = batcher.submit(self.ids, **self.options)
        self.handle.add_listener(self.events.append)

    def check(self, of, heard_all=True):
        """One terminal event; if it finished, the tokens are those of `generate`."""
        output = self.handle.result(timeout=0)
        assert self.events.count(None) == 1
        assert self.events[-1] is None
        if self.is_too_long:
            assert output.finish_reason == "rejected"
            assert isinstance(output.error, OutOfBlocksError)
            return
        expected = alone(of, self.ids, **self.options)
        is_search = self.options.get("num_beams", 1) > 1
        if output.finish_reason == "abort":
            assert self.cancel_after is not None
            assert is_search or output.generated_tokens == expected[0][: len(output.generated_tokens)]
        else:
            assert output.finish_reason in ("stop", "length"), output
            assert padded(output.sequences) == expected, self.options
        if not is_search and heard_all:
            assert self.events[:-1] == output.generated_tokens


def random_request(rng, number):
    """Arrives within thirty steps; may begin as others do, may be cancelled, and may be too long for any pool."""
    system = SYSTEM[number % 3][: rng.choice((0, 4, 15, 16, 24, 30))]
    mode = rng.choices(MODES, WEIGHTS)[0]
    options = mode | {
        "max_new_tokens": rng.choice((1, 2, 5, 9, 16, 24)),
        "eos_token_id": rng.choice((None, STOPS, [STOPS[0]])),
        "seed": number,
        "priority": rng.choice((0, 0, 0, 1, -1)),
        "cache_salt": rng.choice((None, None, "mine")),
        "tenant": rng.choice((None, "a", "b")),
        "expected_tokens": rng.choice((None, 1, 1, 1, 100)),
    }
    asked = Asked(system + prompt(rng.randint(1, 12), seed=rng.randint(0, 3)), options, rng.randint(0, 30))
    if rng.random() < 0.15:
        asked.cancel_after = rng.randint(0, 30)
    if rng.random() < 0.03:
        asked.options["max_new_tokens"], asked.is_too_long = 20_000, True
    return asked


def run_all(batcher, requests, rng):
    """Submits, steps and cancels, and looks at the pool after each step."""
    coming = collections.deque(sorted(requests, key=lambda asked: asked.arrival))
    cancels = collections.defaultdict(list)
    for now in range(MOST_STEPS * max(1, len(requests) // 50)):
        while coming and coming[0].arrival <= now:
            asked = coming.popleft()
            asked.submit(batcher)
            if asked.cancel_after is not None:
                cancels[now + asked.cancel_after].append(asked)
        for asked in cancels.pop(now, ()):
            asked.handle.cancel()
            batcher.pool.check()
        has_work = batcher.step()
        batcher.pool.check()
        if not has_work and not coming:
            return
    raise AssertionError(f"requests are left: {batcher.stats()}")


def stress(of, case, num_requests, seed, **same):
    """Random requests, `same` for all of them, through one batcher; its statistics."""
    rng = random.Random(seed)
    case = dict(case)
    pool = poisoned_pool(
        of, case.pop("num_blocks"), case.pop("block_size"), prefix_caching=case.pop("prefix_caching", True)
    )
    requests = [random_request(rng, number) for number in range(num_requests)]
    if None not in pool.storage.layout.windows:  # nothing is too long for windows
        requests = [asked for asked in requests if not asked.is_too_long]
    for asked in requests:
        asked.options |= same
    with ContinuousBatcher(of, pool, **case) as batcher:
        run_all(batcher, requests, rng)
        stats = batcher.stats()
    for asked in requests:
        asked.check(of)
    assert sum(stats.finished.values()) == len(requests)
    del batcher
    assert_whole(pool)
    return stats


@pytest.mark.parametrize("name", CASES)
def test_random_requests(name):
    """Whatever the order, the room and the neighbours: right tokens, one end each, and a pool that is whole."""
    stress(tiny("llama"), CASES[name], NUM_REQUESTS, seed=name)


@pytest.mark.parametrize("name", ["fcfs", "sjf", "hrrn", "nothing shared"])
def test_crowded_pool(name):
    """The same where every prediction is far too low, so that requests lose their blocks again and again."""
    case = CASES[name] | {"num_blocks": 34, "max_num_seqs": 24, "max_num_batched_tokens": 64}
    stats = stress(tiny("llama"), case, NUM_REQUESTS, seed=name, expected_tokens=1, priority=0, cache_salt=None)
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("kind", ["gemma2", "mistral", "qwen3_next"])
def test_random_requests_to_other_models(kind):
    """Windows, and states that cannot be packed, stand the same."""
    groups = {"gemma2": 2}.get(kind, 1)
    case = {"num_blocks": 36 * groups, "block_size": 4, "max_num_batched_tokens": 16}
    stress(tiny(kind), case, max(NUM_REQUESTS // 2, 1), seed=kind)


@functools.cache
def expected(variant, length, mode, max_new_tokens):
    """What `generate` gives; small numbers of everything, so that it is asked once."""
    return alone(tiny("llama"), few_words(variant, length), **few_options(mode, max_new_tokens))


def few_words(variant, length):
    """Prompts of which many begin alike."""
    return [*SYSTEM[0][: length - 1], SYSTEM[variant][0]]


def few_options(mode, max_new_tokens):
    """The options of `MODES`, with a seed."""
    return MODES[mode] | {"max_new_tokens": max_new_tokens, "eos_token_id": STOPS, "seed": 7}


request_sizes = st.tuples(
    st.integers(0, 2), st.integers(1, 20), st.integers(0, len(MODES) - 1), st.sampled_from((1, 3, 8))
)
steps_between = st.integers(0, 3)


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(request_sizes, steps_between), min_size=1, max_size=10),
    st.sampled_from((1, 2, 4)),
    st.integers(3, 40),
    st.integers(3, 8),
)
def test_any_few_requests(requests, block_size, num_batched_tokens, max_num_seqs):
    """What fails is shrunk to the fewest requests."""
    of = tiny("llama")
    pool = poisoned_pool(of, num_blocks=60 // block_size, block_size=block_size)
    batching = {"max_num_batched_tokens": num_batched_tokens, "max_num_seqs": max_num_seqs}
    handles = []
    with ContinuousBatcher(of, pool, **batching) as batcher:
        for (variant, length, *options), num_steps in requests:
            handles.append(batcher.submit(few_words(variant, length), **few_options(*options)))
            for _ in range(num_steps):
                batcher.step()
                pool.check()
        while batcher.step():
            pool.check()
        outputs = [handle.result(timeout=0) for handle in handles]
    for (sizes, _), output in zip(requests, outputs, strict=True):
        assert padded(output.sequences) == expected(*sizes)
    del batcher, handles
    assert_whole(pool)


def test_requests_from_many_threads():
    """Threads that submit, wait and cancel at once get their own tokens while the batcher's thread works."""
    of, failures = tiny("llama"), []
    per_thread = [[random_request(random.Random(10 * t + i), 10 * t + i) for i in range(8)] for t in range(4)]
    pool = poisoned_pool(of, num_blocks=40, block_size=4)

    def use(batcher, requests):
        try:
            for asked in requests:
                asked.submit(batcher)
                if asked.cancel_after is not None:
                    asked.handle.cancel()
            for asked in requests:
                asked.handle.result(timeout=60)
        except Exception as error:  # noqa: BLE001 (it is raised in the main thread)
            failures.append(error)

    with ContinuousBatcher(of, pool, max_num_batched_tokens=16).start() as batcher:
        threads = [threading.Thread(target=use, args=(batcher, requests)) for requests in per_thread]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for requests in per_thread:
        for asked in requests:
            asked.check(of, heard_all=False)
    del batcher
    assert_whole(pool)
