"""Streams through a paged pipeline: read only so far ahead, closed without a trace, errors in their turn, threads."""

import gc
import itertools
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import TextGenerationPipeline

from paged_cache import InvalidRequestError, OutOfBlocksError, PagedCacheError
from paged_cache.integrations import PipelineTimeoutError, paged_pipeline
from tests.integrations.pipes import GREEDY, TEXTS, make_pipe, one_by_one
from tests.models import assert_whole, poisoned_pool

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def pipe():
    """The unwrapped pipeline."""
    return make_pipe()


@pytest.fixture
def paged(pipe):
    """Four sequences at once, in a pool that is whole in the end."""
    pool = poisoned_pool(pipe.model, num_blocks=60, block_size=16)
    with paged_pipeline(pipe, pool, max_num_seqs=4) as paged:
        yield paged
    del paged
    assert_whole(pool)


@pytest.fixture(scope="module")
def expected(pipe):
    """The outputs for `TEXTS`."""
    return one_by_one(pipe, TEXTS, **GREEDY)


class Counted:
    """Endless texts, and how many of them were read."""

    def __init__(self):
        self.num_read = 0

    def __iter__(self):
        for text in itertools.cycle(TEXTS):
            self.num_read += 1
            yield text


def held(paged):
    """Blocks of requests that are under way."""
    return paged.batcher.stats().blocks_in_use


@pytest.mark.parametrize(("options", "most"), [({}, 32), ({"read_ahead": 3}, 3), ({"read_ahead": 1}, 1)])
def test_inputs_are_read_as_outputs_are_taken(paged, expected, options, most):
    """An endless stream is never more than `read_ahead` inputs ahead of its outputs, by default 8 per sequence."""
    texts = Counted()
    furthest = 0
    with paged((text for text in texts), **options, **GREEDY) as outputs:
        assert texts.num_read <= 1  # transformers looks at the first one
        for number, output in enumerate(itertools.islice(outputs, 40)):
            assert output == expected[number % len(TEXTS)]
            furthest = max(furthest, texts.num_read - number)

    assert min(most, 8) <= furthest <= most + 1
    assert held(paged) == 0


def test_no_more_requests_are_made_than_can_wait(paged):
    """Two requests per sequence are under way at most, however long the stream or list is."""
    most = 0
    for _ in itertools.islice(paged((text for text in Counted()), **GREEDY), 40):
        stats = paged.batcher.stats()
        most = max(most, stats.num_running + stats.num_waiting)

    assert 4 <= most <= 8


def test_a_long_answer_does_not_hold_up_the_others(paged, pipe):
    """While the first output is waited for, later inputs are read and served."""
    lengths = [120] + [2] * 40
    texts = [TEXTS[2]] + [TEXTS[0]] * 40
    outputs = paged((text for text in texts), max_new_tokens=lengths, do_sample=False, read_ahead=41)
    first = next(outputs)

    assert first == pipe(texts[0], max_new_tokens=120, do_sample=False)
    assert paged.batcher.stats().finished["length"] >= 30
    assert len(list(itertools.chain([first], itertools.islice(outputs, 40)))) == 41


@pytest.mark.parametrize("how", ["close", "with", "del", "break"])
def test_a_stream_that_is_left_gives_everything_back(paged, how):
    """Closed, left or dropped in the middle: its requests end, its blocks are free, and no input is read any more."""
    texts = Counted()
    outputs = paged((text for text in texts), **GREEDY | {"max_new_tokens": 60})
    next(outputs)
    assert held(paged) > 0

    if how == "close":
        outputs.close()
        assert list(outputs) == []
    elif how == "with":
        with outputs:
            pass
    elif how == "break":
        for _ in outputs:
            break
    num_read = texts.num_read
    del outputs
    gc.collect()
    if how in ("del", "break"):
        paged.batcher.step()  # garbage collection takes no lock: it only tells the next step

    assert held(paged) == 0
    assert paged.batcher.stats().finished["abort"] > 0
    assert texts.num_read == num_read


def test_an_error_comes_in_its_turn(paged, expected):
    """An input that cannot be served raises where its output would be; those before and behind it are served."""
    texts = [TEXTS[0], TEXTS[0] * 400, TEXTS[1], 7, TEXTS[2]]
    outputs = iter(paged((text for text in texts), **GREEDY))

    assert next(outputs) == expected[0]
    with pytest.raises(OutOfBlocksError, match=r"input 1: .*blocks"):
        next(outputs)
    assert next(outputs) == expected[1]
    with pytest.raises(InvalidRequestError, match="the input is int: 7"):
        next(outputs)
    assert next(outputs) == expected[2]
    assert list(outputs) == []
    assert held(paged) == 0


def test_an_item_that_cannot_be_read_is_one_error(paged, expected):
    """What a dataset raises for an item comes in its turn, and the next item is read."""

    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return TEXTS[index] if index != 1 else 1 / 0

    outputs = paged(Broken(), **GREEDY)

    assert next(outputs) == expected[0]
    with pytest.raises(ZeroDivisionError):
        next(outputs)
    assert next(outputs) == expected[2]
    with pytest.raises(StopIteration):
        next(outputs)


def test_a_stream_that_fails_ends_behind_what_it_gave(paged, expected):
    """What a generator gave before it raised is served first."""

    def texts():
        yield from TEXTS[:3]
        raise OSError("disk")

    outputs = paged(texts(), **GREEDY)

    assert [next(outputs) for _ in range(3)] == expected[:3]
    with pytest.raises(OSError, match="disk"):
        next(outputs)
    with pytest.raises(StopIteration):
        next(outputs)


def test_a_list_raises_at_once(paged):
    """Somebody who waits for all outputs hears of an error before the others are computed, and nothing is left behind."""
    texts = [*TEXTS, TEXTS[0] * 400]
    with pytest.raises(OutOfBlocksError, match="input 5: "):
        paged(texts, **GREEDY | {"max_new_tokens": 100})

    assert held(paged) == 0
    assert paged.batcher.stats().finished["abort"] == len(TEXTS)


def test_errors_may_be_outputs(paged, expected):
    """With `return_errors` each error is in the place of its output, in lists and streams."""
    texts = [TEXTS[0], TEXTS[0] * 400, 7, TEXTS[1]]

    for inputs in (texts, (text for text in texts)):
        first, long, number, last = paged(inputs, return_errors=True, **GREEDY)
        assert (first, last) == (expected[0], expected[1])
        assert isinstance(long, OutOfBlocksError)
        assert isinstance(number, InvalidRequestError)
    assert isinstance(paged(TEXTS[0] * 400, return_errors=True, **GREEDY), OutOfBlocksError)


def test_an_error_of_its_own_ends_one_request(paged, expected):
    """A processor that raises for one input is that input's error."""

    class Fails:
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == num_tokens + 3:
                raise ArithmeticError("three tokens")
            return scores

    num_tokens = len(paged.tokenizer(TEXTS[2])["input_ids"])
    options = {"logits_processor": [Fails()], "do_sample": False}
    failed, output = paged(TEXTS[2:][:1] + TEXTS[3:4], return_errors=True, max_new_tokens=[12, 3], **options)

    assert isinstance(failed, ArithmeticError)
    assert len(paged.tokenizer(TEXTS[3])["input_ids"]) + 3 < num_tokens
    assert output == paged(TEXTS[3], max_new_tokens=3, do_sample=False)
    with pytest.raises(ArithmeticError, match="three tokens"):
        paged(TEXTS[2], max_new_tokens=12, **options)


class Clock:
    """A second per token that is scored."""

    now = 0.0

    def __call__(self):
        return self.now

    def tick(self, input_ids, scores):
        self.now += 1
        return scores


@pytest.fixture
def timed(pipe):
    """A pipeline for one sequence at once, and options by which each token takes a second."""
    clock = Clock()
    with paged_pipeline(pipe, memory="2MiB", clock=clock, max_num_seqs=1, policy="fcfs") as paged:
        yield paged, {**GREEDY, "logits_processor": [clock.tick]}


def test_an_answer_that_is_late_is_an_error(timed, expected):
    """A `timeout` raises, or is the output, in place of an answer that is not complete; what there is of it is there."""
    paged, options = timed
    with pytest.raises(
        TimeoutError, match=r"^the answer was not complete within timeout=2.5 seconds: 3 tokens"
    ) as error:
        paged(TEXTS[0], timeout=2.5, **options)
    assert isinstance(error.value, PagedCacheError)
    output = pickle.loads(pickle.dumps(error.value)).output
    assert len(output.generated_tokens) == 3
    assert output.text
    assert expected[0][0]["generated_text"].startswith(TEXTS[0] + output.text)

    for inputs in (TEXTS[:3], iter(TEXTS[:3])):
        first, late, never = paged(inputs, timeout=[None, 16.5, 0.5], return_errors=True, **options)
        assert first == expected[0]
        assert isinstance(late, PipelineTimeoutError)
        assert str(late).startswith("input 1: ")
        assert 0 < len(late.output.generated_tokens) < 12
        assert never.output.generated_tokens == []
        assert never.output.text == ""
    with pytest.raises(PipelineTimeoutError, match="input 1: "):
        paged(TEXTS, timeout=[None, 2.5, None, None, None], **options)


def test_an_answer_in_time_is_an_answer(timed, expected):
    """A `timeout` that is not reached changes nothing, and `max_time` cuts the answer, as in `generate`."""
    paged, options = timed

    assert paged(TEXTS[:2], timeout=100, **options) == expected[:2]
    for timeout in (None, 100):
        ((record,),) = paged(TEXTS[:1], timeout=timeout, max_time=1e-9, **options)
        assert TEXTS[0] < record["generated_text"] < expected[0][0]["generated_text"]
    with pytest.raises(PipelineTimeoutError):
        paged(TEXTS[0], timeout=0.5, max_time=1e-9, **options)


def test_wrong_options_raise_before_any_work(paged):
    """An option that cannot be honoured is named, and nothing is computed."""
    before = paged.batcher.stats().num_steps
    wrong = [
        ({"seed": [1, 2]}, "seed has 2 entries for 5 inputs"),
        ({"seed": "a"}, "seed='a'"),
        ({"past_key_values": object()}, "past_key_values cannot be honoured"),
        ({"num_beams": 2, "return_dict_in_generate": True}, "beam_indices"),
        ({"read_ahead": 0}, "read_ahead=0"),
        ({"no_such_option": 3}, "no_such_option"),
        ({"max_new_tokens": [3]}, "max_new_tokens has 1 entries for 5 inputs"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            paged(TEXTS, **GREEDY | options)
    with pytest.raises(InvalidRequestError, match="streamer is one for 5 inputs"):
        paged(TEXTS, streamer=_Streamer(), **GREEDY)
    with pytest.raises(InvalidRequestError, match="streamer is one for many inputs"):
        paged((text for text in TEXTS), streamer=_Streamer(), **GREEDY)

    assert paged.batcher.stats().num_steps == before
    assert held(paged) == 0


class _Streamer:
    def put(self, value):
        raise AssertionError(value)

    end = put


def test_a_stream_with_too_few_seeds(paged, expected):
    """A list that is shorter than a stream is an error of the first input that it has nothing for."""
    outputs = paged((text for text in TEXTS), seed=[1, 2], **GREEDY)

    assert [next(outputs), next(outputs)] == expected[:2]
    with pytest.raises(InvalidRequestError, match="seed has 2 entries and there are more inputs"):
        next(outputs)


def test_a_stream_with_too_many_seeds(paged, expected):
    """What a list has left when a stream ends is an error behind the last output, and then there is no more."""
    for options in ({"seed": [1, 2, 3, 4]}, {"max_new_tokens": [12] * 7}, {"timeout": [60] * 4, "read_ahead": 1}):
        ((name, values), *_) = options.items()
        outputs = paged((text for text in TEXTS[:3]), **GREEDY | options)
        assert [next(outputs) for _ in range(3)] == expected[:3]
        with pytest.raises(InvalidRequestError, match=f"{name} has {len(values)} entries for 3 inputs"):
            next(outputs)
        with pytest.raises(StopIteration):
            next(outputs)
    *found, error = paged(iter(TEXTS[:3]), seed=[1, 2, 3, 4], return_errors=True, **GREEDY)
    assert found == expected[:3]
    assert isinstance(error, InvalidRequestError)
    assert list(paged(iter(TEXTS[:3]), seed=[1, 2, 3], **GREEDY)) == expected[:3]
    with pytest.raises(InvalidRequestError, match="seed has 2 entries for 0 inputs"):
        paged([], seed=[1, 2], **GREEDY)


def test_ctrl_c_gives_everything_back(paged, monkeypatch):
    """An interrupt while outputs are waited for ends the requests of that call."""
    outputs = paged((text for text in Counted()), **GREEDY)
    next(outputs)
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "_read", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(outputs)

    assert held(paged) == 0


def test_threads_share_a_pipeline(paged, expected):
    """Calls of all kinds at the same time, each with its own options, give what they give alone."""
    barrier = threading.Barrier(6)

    def call(number):
        barrier.wait(timeout=20)
        if number % 3 == 0:
            return paged(TEXTS, **GREEDY) == expected
        if number % 3 == 1:
            return list(paged((text for text in TEXTS), **GREEDY)) == expected
        texts = paged(TEXTS, truncation=True, tokenizer_encode_kwargs={"max_length": 30}, **GREEDY)
        return texts == expected

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(call, range(6), timeout=40)) == [True] * 6


class Watched(TextGenerationPipeline):
    """Sees how many threads use its tokenizer at once."""

    inside = most = 0

    def preprocess(self, *args, **kwargs):
        Watched.inside += 1
        Watched.most = max(Watched.most, Watched.inside)
        time.sleep(0.01)
        inputs = super().preprocess(*args, **kwargs)
        Watched.inside -= 1
        return inputs


def test_threads_take_turns_at_the_tokenizer(pipe, expected):
    """A tokenizer's truncation and padding are its state: no two threads are in it at once."""
    watched = Watched(model=pipe.model, tokenizer=pipe.tokenizer, task="text-generation", device="cpu")
    with paged_pipeline(watched, memory="2MiB") as paged, ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda _: paged(TEXTS, **GREEDY), range(4), timeout=40))

    assert outputs == [expected] * 4
    assert Watched.most == 1


def test_a_thread_of_the_batcher_may_work(paged, expected):
    """With `paged.batcher.start()` requests go on while nobody waits."""
    paged.batcher.start()
    outputs = paged((text for text in TEXTS), **GREEDY)
    next(outputs)
    done = threading.Event()
    for _ in range(200):
        if sum(paged.batcher.stats().finished.values()) == len(TEXTS):
            break
        done.wait(0.05)

    assert sum(paged.batcher.stats().finished.values()) == len(TEXTS)
    assert [next(outputs) for _ in TEXTS[1:]] == expected[1:]


def test_a_pipeline_that_is_closed_under_way(pipe):
    """A stream of a pipeline that was closed raises for what was under way; new calls are refused."""
    paged = paged_pipeline(pipe, memory="4MiB", max_num_seqs=4)
    outputs = paged((text for text in TEXTS), **GREEDY)
    next(outputs)
    paged.close()
    paged.close()

    left = [error for error in (_error(outputs) for _ in TEXTS[1:]) if error]
    assert left
    assert all(isinstance(error, PagedCacheError) and "closed" in str(error) for error in left)
    with pytest.raises(PagedCacheError, match="this pipeline is closed"):
        paged("for", **GREEDY)


def _error(outputs):
    try:
        next(outputs)
    except PagedCacheError as error:
        return error
    return None


def test_seeds_are_drawn_in_order(paged):
    """Without seeds torch's generator decides, and input by input: the same list gives the same texts."""
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(paged(TEXTS, do_sample=True, max_new_tokens=10))

    assert runs[0] == runs[1]


def test_a_bar_is_shown_on_request(paged, monkeypatch):
    """Lists have a progress bar on a terminal, streams if asked for, and nobody who says no."""
    shown = []

    class Bar:
        def __init__(self, total, unit, disable):
            shown.append((total, disable))

        def update(self):
            shown.append("one")

        def close(self):
            pass

    monkeypatch.setattr("paged_cache.integrations.paged_iterator.tqdm", Bar)
    paged(TEXTS, **GREEDY)
    assert shown == [(5, None)] + ["one"] * 5
    shown.clear()
    paged(TEXTS, progress_bar=False, **GREEDY)
    list(paged((text for text in TEXTS[:1]), **GREEDY))
    list(paged((text for text in TEXTS[:1]), progress_bar=True, **GREEDY))
    assert [line for line in shown if line != "one"] == [(5, True), (None, True), (None, None)]
