"""Batchers that are looked at after each step, and models, memories and users that fail when they are told to."""

import contextlib
import gc
import inspect
import itertools
import threading
import time

from paged_cache import ContinuousBatcher
from paged_cache.memory.growth import Growth
from tests.batching.alone import alone, prompt, tiny
from tests.models import assert_whole, poisoned_pool

PATIENCE = 20
"""Seconds for anything that a test waits for."""

MOST_STEPS = 400
PROMPTS = [prompt(length, seed) for seed, length in enumerate((5, 17, 3, 9, 26))]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@contextlib.contextmanager
def batching(name="llama", num_blocks=300, block_size=4, prefix_caching=True, **settings):
    """A batcher on a poisoned pool; in the end all blocks are back."""
    of = tiny(name)
    pool = poisoned_pool(of, num_blocks, block_size, prefix_caching=prefix_caching)
    with ContinuousBatcher(of, pool, **settings) as batcher:
        yield batcher
    assert_whole(pool)


def expected(*prompts, name="llama", **options):
    """What `generate` gives for each prompt alone: the first returned sequence."""
    return [alone(tiny(name), ids, **{**GREEDY, **options})[0] for ids in prompts or PROMPTS]


def submit_all(batcher, prompts=None, **options):
    """A handle per prompt."""
    return [batcher.submit(ids, **{**GREEDY, **options}) for ids in prompts or PROMPTS]


def run(batcher, handles=()):
    """Steps to the end, the pool sound after each; outputs of the handles. Interrupts on the way are passed over."""
    for _ in range(MOST_STEPS):
        try:
            has_work = batcher.step()
        except KeyboardInterrupt:
            has_work = True
        batcher.pool.check()
        if not has_work:
            return [handle.result(timeout=0) for handle in handles]
    raise AssertionError(f"not over after {MOST_STEPS} steps: {batcher.stats()}")


def tokens(outputs):
    """Generated tokens of each output."""
    return [output.generated_tokens for output in outputs]


def reasons(outputs):
    """Finish reason of each output."""
    return [output.finish_reason for output in outputs]


def is_free(pool):
    """Whether all blocks are back, once nobody holds what is garbage."""
    gc.collect()
    pool.check()
    return pool.num_free == pool.num_blocks


def wait_for(condition, what):
    """Until a condition holds that other threads bring about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


def in_threads(*functions):
    """Runs functions at once, a thread each; their results. What one raises is raised here."""
    results, errors = [None] * len(functions), []

    def call(i, function):
        try:
            results[i] = function()
        except BaseException as error:  # noqa: BLE001 (raised below, in the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    for error in errors:
        raise error
    return results


@contextlib.contextmanager
def failing(of, fails, error, late=False):
    """Lets a model raise in forwards for which `fails(number, num_tokens)`, numbered from 1, or `fails(number, num_tokens, ids)`.

    At the beginning, or `late`: when all layers have written their keys and values. `error` is one, or makes one.
    """
    numbers = itertools.count(1)
    seen = []

    def see(module, args):
        about = {"number": next(numbers), "num_tokens": args[0].shape[:2].numel(), "ids": args[0]}
        seen[:] = list(about.values()) if "ids" in inspect.signature(fails).parameters else list(about.values())[:2]
        if not late:
            hook()

    def hook(*_):
        if fails(*seen):
            raise error if isinstance(error, BaseException) else error()

    handles = [of.get_input_embeddings().register_forward_pre_hook(see)]
    if late:
        handles.append(of.model.norm.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Streamer:
    """Notes what it gets, and raises at one of its calls: 0 is the prompt, "end" the end."""

    def __init__(self, raises_at=None, error=ValueError):
        self.calls, self._raises_at, self._error = [], raises_at, error

    def put(self, value):
        self._note(value.tolist(), len(self.calls))

    def end(self):
        self._note("end", "end")

    def _note(self, value, place):
        self.calls.append(value)
        if place == self._raises_at:
            self._raises_at = None
            raise self._error("the streamer")


def hold_all(pool, leave=0):
    """A sequence of somebody outside the batcher that takes all blocks but `leave`; `pool.manager.release` gives them back."""
    sequence = pool.manager.new_sequence()
    pool.manager.extend([Growth(sequence, (pool.num_free - leave) * pool.block_size // len(sequence.tables), None)])
    return sequence
