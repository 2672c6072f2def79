"""Whatever fails ends the requests it belongs to, gives their blocks back, and leaves the others' tokens alone."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TopPLogitsWarper

from paged_cache import InvalidRequestError, OutOfBlocksError, PagedCache
from paged_cache.batching import engine as engine_module
from paged_cache.batching.budget import RECOVERY_STEPS
from paged_cache.batching.policy import Policy
from tests.batching.alone import alone, prompt, tiny
from tests.batching.faults import (
    GREEDY,
    PROMPTS,
    Streamer,
    batching,
    expected,
    failing,
    hold_all,
    is_free,
    reasons,
    run,
    submit_all,
    tokens,
)

pytestmark = pytest.mark.timeout(10)

# packed and padded; where a padded forward fails late, states of linear attention are behind the step already
both = pytest.mark.parametrize(("name", "late"), [("llama", False), ("llama", True), ("qwen3_next", True)])

SAMPLED = {"do_sample": True, "temperature": 1.3, "max_new_tokens": 6}


class OutOfMemory(torch.OutOfMemoryError):
    """As a device raises it."""

    def __init__(self):
        super().__init__("CUDA out of memory. Tried to allocate 20.00 MiB")


class Doing(LogitsProcessor):
    """Calls a function with its 1-based call number and the scores; what that returns replaces the scores."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        result = self.function(self.calls, scores)
        return scores if result is None else result


def doing(function):
    """A list with such a processor."""
    return LogitsProcessorList([Doing(function)])


def raising_at(number, error=ValueError):
    """Raises at one call."""

    def function(calls, scores):
        if calls == number:
            raise error("at this call")

    return function


# A forward that raises


@both
@pytest.mark.parametrize("number", [1, 2, 4])
def test_forward_that_raises_once(number, name, late, caplog):
    """What fails in a step of several requests and in none of them alone costs nobody anything but time."""
    failed = []
    with batching(name, max_num_seqs=3, max_num_batched_tokens=24) as batcher:
        handles = submit_all(batcher)
        with failing(tiny(name), lambda n, _: n == number and not failed.append(n), RuntimeError("broke"), late):
            outputs = run(batcher, handles)
        assert failed == [number]
        assert "requests failed, each is computed alone: RuntimeError: broke" in caplog.text
        assert tokens(outputs) == expected(name=name)
        assert reasons(outputs) == ["length"] * len(PROMPTS)
        assert is_free(batcher.pool)


@both
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_forward_that_raises_for_one_request(where, name, late):
    """Whoever makes the model raise ends with the cause and the tokens before it; all others have theirs."""
    want = expected(name=name)
    culprit = 2
    token = PROMPTS[culprit][-1] if where == "prompt" else want[culprit][2]
    ends = [place(token, ids, right) for ids, right in zip(PROMPTS, want, strict=True)]
    assert ends.count(None) >= 2
    error = RuntimeError("this token breaks the model")
    with batching(name, max_num_seqs=4, max_num_batched_tokens=64) as batcher:
        handles = submit_all(batcher)
        with failing(tiny(name), lambda n, _, ids: bool((ids == token).any()), error, late):
            outputs = run(batcher, handles)
        for output, right, end in zip(outputs, want, ends, strict=True):
            assert output.generated_tokens == right[:end]
            assert output.error is (None if end is None else error)
            assert output.finish_reason == ("length" if end is None else "error")
        assert is_free(batcher.pool)
        assert tokens(run(batcher, submit_all(batcher))) == want


def place(token, ids, answer):
    """How many tokens there are of an answer when the model has to read `token`; None if it never does."""
    return 0 if token in ids else answer.index(token) + 1 if token in answer[:-1] else None


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_forward_that_raises_again_and_again(name):
    """Every k-th forward fails: the batcher comes to its end each time, with every request over and every block back."""
    want = expected(name=name)
    with batching(name, max_num_seqs=3, max_num_batched_tokens=24) as batcher:
        for every in (1, 2, 3, 5):
            with failing(tiny(name), lambda n, _, every=every: n % every == 0, RuntimeError("again")):
                outputs = run(batcher, submit_all(batcher))
            assert set(reasons(outputs)) <= {"error", "length"}
            assert every > 1 or set(reasons(outputs)) == {"error"}
            for output, right in zip(outputs, want, strict=True):
                assert output.generated_tokens == right[: len(output.generated_tokens)]
                assert (output.error is None) == (output.generated_tokens == right)
            assert is_free(batcher.pool)
        assert tokens(run(batcher, submit_all(batcher))) == want


def test_forward_that_raises_for_several_rows():
    """Several sequences and beams of one request fail together, and give the blocks of all rows back; or go on together."""
    options = [{"num_beams": 3}, {**SAMPLED, "num_return_sequences": 2, "seed": 3}, {}]
    with batching() as batcher:
        for fails in (lambda n, _: n == 4, lambda n, _: n >= 4):
            want = [output.sequences for output in run(batcher, several(batcher, options))]
            with failing(tiny("llama"), fails, RuntimeError("the model broke")):
                outputs = run(batcher, several(batcher, options))
            is_once = fails(4, 0) and not fails(5, 0)
            assert reasons(outputs) == ["length" if is_once else "error"] * 3
            assert not is_once or [output.sequences for output in outputs] == want
            assert is_free(batcher.pool)


def several(batcher, options):
    return [batcher.submit(PROMPTS[1], **{**GREEDY, **own}) for own in options]


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_out_of_memory_alone(name):
    """Where a step fails and then memory runs out for one request of it, that one is computed with less, or ends."""
    errors = [RuntimeError("the step"), OutOfMemory()]
    numbers = {1: 0, 2: 1} if name == "llama" else {3: 0, 4: 1}  # prompts of the latter have forwards of their own
    with batching(name, max_num_batched_tokens=64) as batcher:
        handles = submit_all(batcher)
        seen = []
        with failing(tiny(name), lambda n, _: n in numbers and not seen.append(n), lambda: errors[numbers[seen[-1]]]):
            outputs = run(batcher, handles)
        assert seen == list(numbers)
        want = expected(name=name)
        is_cut = [output.error is errors[1] for output in outputs]
        assert is_cut.count(True) == (0 if name == "llama" else 1)
        assert all(
            cut or output.generated_tokens == right for cut, output, right in zip(is_cut, outputs, want, strict=True)
        )
        assert is_free(batcher.pool)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_no_memory_alone_and_an_error_in_company(name, monkeypatch):
    """Nothing works, whatever is tried: all requests end, instead of being tried forever."""
    original = engine_module.Engine._execute

    def execute(self, plan, count):
        if len({chunk.request.request_id for chunk in plan.chunks}) > 1:
            raise RuntimeError("in company")
        raise OutOfMemory

    with batching(name) as batcher:
        monkeypatch.setattr(engine_module.Engine, "_execute", execute)
        outputs = run(batcher, submit_all(batcher))
        assert [type(output.error) for output in outputs] == [OutOfMemory] * len(PROMPTS)
        monkeypatch.setattr(engine_module.Engine, "_execute", original)
        assert tokens(run(batcher, submit_all(batcher))) == expected(name=name)


def test_budget_is_kept_alone(monkeypatch):
    """Rows of a request that are computed again after a failure share the token budget."""
    counts, broken = [], []
    original = engine_module.Engine._execute

    def execute(self, plan, count):
        counts.append(sum(chunk.num_tokens for chunk in plan.chunks))
        original(self, plan, count)
        if len(plan.chunks) > 8 and not broken:
            broken.append(plan)
            raise RuntimeError("once, with logits that are lost")

    monkeypatch.setattr(engine_module.Engine, "_execute", execute)
    options = {"do_sample": True, "num_return_sequences": 8, "seed": 1, "max_new_tokens": 6}
    ids = prompt(60, 1)
    with batching(max_num_batched_tokens=16, max_num_seqs=16, prefix_caching=False) as batcher:
        handles = [batcher.submit(ids, **options), batcher.submit(PROMPTS[0], **GREEDY | {"max_new_tokens": 20})]
        outputs = run(batcher, handles)
    assert broken
    assert max(counts) <= 16
    assert outputs[0].sequences == alone(tiny("llama"), ids, **options)


# Memory


@both
def test_out_of_memory_is_tried_with_less(name, late):
    """Steps of too many tokens run out of memory: all requests end with the right tokens all the same."""
    with batching(name, max_num_seqs=4, max_num_batched_tokens=64) as batcher:
        most = 12 if name == "llama" else 26  # prompts of the latter come in one piece
        with failing(tiny(name), lambda _, num_tokens: num_tokens > most, OutOfMemory, late):
            outputs = run(batcher, submit_all(batcher))
        assert reasons(outputs) == ["length"] * len(PROMPTS)
        assert tokens(outputs) == expected(name=name)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_out_of_memory_in_some_forwards(name):
    """Any single forward may run out of memory, the one for prompts behind the one for decoding rows included."""
    want = expected(name=name)
    with batching(name, max_num_seqs=3, max_num_batched_tokens=24) as batcher:
        for number in (2, 3, 4, 7):
            with failing(tiny(name), lambda n, _, number=number: n == number, OutOfMemory):
                assert tokens(run(batcher, submit_all(batcher))) == want


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_out_of_memory_for_good(name):
    """Where nothing fits, not even the smallest step, requests end with the cause instead of trying forever."""
    with batching(name, max_num_batched_tokens=24) as batcher:
        with failing(tiny(name), lambda *_: True, OutOfMemory):
            outputs = run(batcher, submit_all(batcher))
        assert reasons(outputs) == ["error"] * len(PROMPTS)
        assert all(isinstance(output.error, torch.OutOfMemoryError) for output in outputs)
        assert tokens(run(batcher, submit_all(batcher))) == expected(name=name)


def test_budget_recovers():
    """After enough good steps the batcher uses as many tokens per step as before it ran out of memory."""
    sizes = []
    with batching(max_num_batched_tokens=64) as batcher:
        forward = batcher._engine.forward.inner

        def counted(chunks):
            sizes.append(sum(chunk.num_tokens for chunk in chunks))
            return forward(chunks)

        batcher._engine.forward.inner = counted
        counted.settle = forward.settle
        with failing(tiny("llama"), lambda n, _: n == 1, OutOfMemory):
            run(batcher, submit_all(batcher, [prompt(64, 1)]))
        assert sizes[:3] == [64, 32, 32]
        run(batcher, submit_all(batcher, [prompt(5, 2)], max_new_tokens=2 * RECOVERY_STEPS))
        sizes.clear()
        run(batcher, submit_all(batcher, [prompt(64, 3)]))
        assert sizes[0] == 64


def test_blocks_taken_between_plan_and_execution():
    """Somebody outside takes blocks just before a forward: requests are preempted, and all end with the right tokens."""
    with batching(num_blocks=40, max_num_seqs=4) as batcher:
        forward, pool = batcher._engine.forward.inner, batcher.pool
        taken = []

        def robbed(chunks):
            if len(chunks) > 2 and len(taken) < 3:
                taken.append(hold_all(pool))
            return forward(chunks)

        robbed.settle = forward.settle
        batcher._engine.forward.inner = robbed
        handles = submit_all(batcher)
        for _ in range(100):
            batcher.step()
            pool.check()
            for sequence in taken:
                pool.manager.release(sequence)
        outputs = run(batcher, handles)
        assert batcher.stats().num_preemptions
        assert tokens(outputs) == expected()


def test_cache_of_the_user_beside_the_batcher():
    """A `PagedCache` on the same pool takes what it needs between steps; both give the right tokens."""
    of, want = tiny("llama"), expected()
    with batching(num_blocks=30, max_num_seqs=4) as batcher:
        handles = submit_all(batcher)
        batcher.step()
        cache = PagedCache(batcher.pool)
        ids = torch.tensor([prompt(40, 9)])
        assert (
            of.generate(ids, **GREEDY, past_key_values=cache)[0, 40:].tolist()
            == alone(of, ids[0].tolist(), **GREEDY)[0]
        )
        assert tokens(run(batcher, handles)) == want
        del cache


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_blocks_held_outside_forever(steps, monkeypatch):
    """Blocks that never come back: requests end with `OutOfBlocksError` after a while, whatever they had done by then."""
    monkeypatch.setattr(engine_module, "BLOCKED_SECONDS", 5.0)
    now = [0.0]
    with batching(num_blocks=20, max_num_batched_tokens=8, clock=lambda: now[0]) as batcher:
        handles = submit_all(batcher, [prompt(26, 1), prompt(21, 2)])
        for _ in range(steps):
            batcher.step()
        sequence = hold_all(batcher.pool)
        for _ in range(200):
            now[0] += 0.5
            batcher.step()
            batcher.pool.check()
        outputs = [handle.result(timeout=0) for handle in handles]
        failed = [output for output in outputs if output.error is not None]
        assert len(failed) == (1 if steps == 3 else 2)  # the blocks of the first are enough for the other
        assert all(isinstance(output.error, OutOfBlocksError) for output in failed)
        batcher.pool.manager.release(sequence)
        assert tokens(run(batcher, submit_all(batcher, PROMPTS[:2]))) == expected()[:2]


def test_blocks_held_outside_for_a_while(monkeypatch):
    """Blocks that come back in time: requests wait for them and end with the right tokens."""
    monkeypatch.setattr(engine_module, "BLOCKED_SECONDS", 5.0)
    now = [0.0]
    with batching(num_blocks=20, max_num_batched_tokens=8, clock=lambda: now[0]) as batcher:
        sequence = hold_all(batcher.pool, leave=1)
        handles = submit_all(batcher, PROMPTS[:2])
        for _ in range(8):
            now[0] += 0.5
            batcher.step()
        batcher.pool.manager.release(sequence)
        assert tokens(run(batcher, handles)) == expected()[:2]


# Interrupts


@both
def test_interrupt_in_a_forward(name, late):
    """Ctrl-C in any forward takes the step back; the next step goes on and all tokens are right."""
    want = expected(name=name)
    with batching(name, max_num_seqs=3, max_num_batched_tokens=24) as batcher:
        for number in (1, 2, 3, 5, 8):
            handles = submit_all(batcher)
            with failing(tiny(name), lambda n, _, number=number: n == number, KeyboardInterrupt, late):
                assert tokens(run(batcher, handles)) == want


def mixed(own=None):
    """Prompts and options of all kinds; number 2 has some of its own."""
    return [
        (PROMPTS[0], {**GREEDY}),
        (PROMPTS[1], {**SAMPLED, "seed": 5}),
        (PROMPTS[2], {**GREEDY, **(own or {})}),
        (PROMPTS[3], {**SAMPLED, "seed": 7, "repetition_penalty": 1.5}),
        (PROMPTS[4], {**SAMPLED, "seed": 8, "num_return_sequences": 2}),
    ]


@pytest.mark.parametrize("number", [1, 2, 6])
@pytest.mark.parametrize("is_sampled", [False, True])
def test_interrupt_in_the_choice(number, is_sampled):
    """Ctrl-C while tokens are chosen: nobody's random numbers are drawn twice, and all tokens are right."""
    own = {**SAMPLED, "seed": 9} if is_sampled else {}
    processor = doing(raising_at(number, KeyboardInterrupt))
    requests = mixed(own)
    want = [alone(tiny("llama"), ids, **options) for ids, options in requests]
    requests[2][1]["logits_processor"] = processor
    with batching() as batcher:
        handles = [batcher.submit(ids, **options) for ids, options in requests]
        assert [output.sequences for output in run(batcher, handles)] == want
        assert processor[0].calls > 6


@pytest.mark.parametrize(
    ("place", "name"), [(0, "llama"), (1, "llama"), (3, "qwen3_next"), (6, "llama"), ("end", "llama")]
)
def test_interrupt_in_a_streamer(place, name):
    """Ctrl-C in a streamer: all tokens are right, the others' too, and each token is streamed once."""
    requests = mixed()
    want = [alone(tiny(name), ids, **options) for ids, options in requests]
    streamer = Streamer(place, KeyboardInterrupt)
    requests[2][1]["streamer"] = streamer
    with batching(name) as batcher:
        handles = [batcher.submit(ids, **options) for ids, options in requests]
        outputs = run(batcher, handles)
        assert [output.sequences for output in outputs] == want
        assert reasons(outputs) == ["length"] * 5
    assert streamer.calls == [[PROMPTS[2]], *([token] for token in want[2][0]), "end"]


@pytest.mark.parametrize("number", [1, 3, 6])
def test_interrupt_in_a_criterion(number):
    """Ctrl-C in a stopping criterion: no token is counted twice."""

    class Interrupting(StoppingCriteria):
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            if self.calls == number:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    criterion = Interrupting()
    requests = mixed()
    want = [alone(tiny("llama"), ids, **options) for ids, options in requests]
    requests[2][1]["stopping_criteria"] = StoppingCriteriaList([criterion])
    with batching() as batcher:
        handles = [batcher.submit(ids, **options) for ids, options in requests]
        assert [output.sequences for output in run(batcher, handles)] == want
    assert criterion.calls > number


# Users' own code


def broken_options():
    """What a caller may bring along that fails, by kind, and how many tokens come before it does."""

    class Never(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == len(PROMPTS[2]) + 3:
                raise ValueError("the criterion")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def allowed(batch_id, input_ids):
        if len(input_ids) == len(PROMPTS[2]) + 3:
            raise ValueError("the function")
        return list(range(128))

    def nan(calls, scores):
        return scores * float("nan") if calls == 3 else scores

    return {
        "processor": {"logits_processor": doing(raising_at(3))},
        "first call of a processor": {"logits_processor": doing(raising_at(1))},
        "streamer at the prompt": {"streamer": Streamer(0)},
        "streamer at a token": {"streamer": Streamer(3)},
        "streamer at the last token": {"streamer": Streamer(6)},
        "streamer at the end": {"streamer": Streamer("end")},
        "criterion": {"stopping_criteria": StoppingCriteriaList([Never()])},
        "allowed tokens": {"prefix_allowed_tokens_fn": allowed},
        "no allowed tokens": {"prefix_allowed_tokens_fn": lambda batch_id, input_ids: []},
        "processor that returns nothing": {"logits_processor": LogitsProcessorList([lambda ids, scores: None])},
        "processor that returns another shape": {"logits_processor": doing(lambda _, scores: scores[:, :5])},
        "processor that returns one row": {"logits_processor": doing(lambda _, scores: scores[0])},
        "processor that returns a list": {"logits_processor": doing(lambda _, scores: scores.tolist())},
        "not a number while sampling": {**SAMPLED, "seed": 1, "logits_processor": doing(nan)},
        "processor while sampling": {**SAMPLED, "seed": 1, "logits_processor": doing(raising_at(3))},
        "processor of beams": {"num_beams": 2, "logits_processor": doing(raising_at(3))},
        "first call of a processor of beams": {"num_beams": 2, "logits_processor": doing(raising_at(1))},
        "processor of several": {**SAMPLED, "num_return_sequences": 3, "logits_processor": doing(raising_at(2))},
        "processor of beams leaves": {"num_beams": 2, "logits_processor": doing(raising_at(2, SystemExit))},
    }


@pytest.mark.parametrize("kind", broken_options())
def test_users_code_that_raises(kind):
    """It ends its own request, with the cause, and no other request's tokens change."""
    requests = [(ids, {**options}) for ids, options in mixed()]
    want = [alone(tiny("llama"), ids, **options) for ids, options in requests]
    requests[2][1].update(broken_options()[kind])
    with batching() as batcher:
        handles = [batcher.submit(ids, **options) for ids, options in requests]
        outputs = run(batcher, handles)
        assert reasons(outputs) == ["length", "length", "error", "length", "length"]
        assert isinstance(outputs[2].error, Exception)
        assert [output.sequences for i, output in enumerate(outputs) if i != 2] == want[:2] + want[3:]
        if kind in ("streamer at a token", "criterion", "allowed tokens", "processor"):
            assert outputs[2].generated_tokens[:2] == want[2][0][:2]
            assert len(outputs[2].generated_tokens) in (2, 3)
        if kind == "streamer at the end":
            assert outputs[2].generated_tokens == want[2][0]
        assert is_free(batcher.pool)


class Unordered(Policy):
    """Raises in one of its methods, for requests of five tokens."""

    name = "unordered"

    def __init__(self, method):
        self._method = method

    def _do(self, method):
        if method == self._method:
            raise ValueError(method)

    def key(self, request, outlook):
        if request.num_prompt_tokens == len(PROMPTS[0]):
            self._do("key")
            return float("nan") if self._method == "nan" else 0.0
        return 0.0

    def lane(self, request):
        if request.num_prompt_tokens == len(PROMPTS[0]):
            self._do("lane")
        return 0.0

    def rank(self, key, lane, now):
        self._do("rank")
        return key


def failing_top_p(monkeypatch, numbers, error):
    """Lets the processor that requests share raise at some of its calls."""
    original, calls = TopPLogitsWarper.__call__, []

    def call(self, input_ids, scores):
        calls.append(len(scores))
        if len(calls) in numbers:
            raise error
        return original(self, input_ids, scores)

    monkeypatch.setattr(TopPLogitsWarper, "__call__", call)


def with_top_p():
    """Prompts and options; the first two share a processor."""
    shared = {**SAMPLED, "top_p": 0.8}
    own = [{**shared, "seed": 1}, {**shared, "seed": 2, "num_return_sequences": 2}, {}, {}, {}]
    return [(ids, {**GREEDY, **options}) for ids, options in zip(PROMPTS, own, strict=True)]


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_out_of_memory_in_a_shared_processor(name, number, monkeypatch):
    """The step is tried with less, and all requests end with the right tokens; the caller of `step` sees nothing."""
    want = [alone(tiny(name), ids, **options) for ids, options in with_top_p()]
    failing_top_p(monkeypatch, [number], OutOfMemory())
    with batching(name) as batcher:
        outputs = run(batcher, [batcher.submit(ids, **options) for ids, options in with_top_p()])
        assert [output.sequences for output in outputs] == want


@pytest.mark.parametrize("numbers", [[2], range(2, 99)])
def test_shared_processor_that_raises(numbers, monkeypatch):
    """Requests for which it raises alone end with the cause, others are served."""
    error = ValueError("the shared one")
    want = [alone(tiny("llama"), ids, **options) for ids, options in with_top_p()]
    failing_top_p(monkeypatch, numbers, error)
    with batching(max_num_seqs=3) as batcher:
        outputs = run(batcher, [batcher.submit(ids, **options) for ids, options in with_top_p()])
        assert [output.error for output in outputs] == [error if len(numbers) > 1 else None] * 2 + [None] * 3
        assert all(output.error or output.sequences == right for output, right in zip(outputs, want, strict=True))
        assert is_free(batcher.pool)


def test_slow_failures_are_not_blocked():
    """Forwards that fail, however late, say nothing about blocks: who waits behind them is served."""
    now = [0.0]
    with batching(max_num_seqs=1, clock=lambda: now[0]) as batcher:
        handles = submit_all(batcher)

        def fails(number, _):
            now[0] += 6
            return number <= 3

        with failing(tiny("llama"), fails, RuntimeError("the model broke")):
            for _ in range(3):
                batcher.step()
        assert sorted(reasons(run(batcher, handles))) == ["error"] * 3 + ["length"] * 2
        assert not any(isinstance(handle.result().error, OutOfBlocksError) for handle in handles)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("raises", [False, True])
def test_interrupt_in_a_policy(number, raises):
    """Ctrl-C while requests get their keys loses none of them, also if another one cannot get a key."""

    class Interrupting(Policy):
        calls = 0

        def key(self, request, outlook):
            self.calls += 1
            if self.calls == number:
                raise KeyboardInterrupt
            return float("nan") if raises and len(request.prompt_ids) == len(PROMPTS[3]) else 0.0

    policy = Interrupting()
    with batching(policy=policy) as batcher:
        handles = submit_all(batcher, timeout=1000)
        outputs = run(batcher, handles)
        assert reasons(outputs) == ["length"] * 3 + ["error" if raises else "length", "length"]
        assert policy.calls > number
        assert batcher.stats().num_waiting == 0


@pytest.mark.parametrize("key", [None, "first", 1j, [1.0]], ids=str)
def test_keys_that_are_no_numbers(key):
    """They would stop everybody's order: their request ends with a clear error, the others are served."""

    class Odd(Policy):
        def key(self, request, outlook):
            return key if len(request.prompt_ids) == len(PROMPTS[3]) else 0

    with batching(policy=Odd()) as batcher:
        outputs = run(batcher, submit_all(batcher))
        assert reasons(outputs) == ["length"] * 3 + ["error", "length"]
        assert isinstance(outputs[3].error, InvalidRequestError)
        assert "a number is needed" in str(outputs[3].error)


@pytest.mark.parametrize("method", ["key", "nan", "lane"])
def test_policy_that_raises(method):
    """A request that a user's policy cannot place ends with the cause; the others are served."""
    with batching(policy=Unordered(method)) as batcher:
        outputs = run(batcher, submit_all(batcher))
        assert reasons(outputs) == ["error"] + ["length"] * 4
        assert isinstance(outputs[0].error, ValueError)
        assert tokens(outputs)[1:] == expected()[1:]
        assert batcher.stats().num_waiting == batcher.stats().num_running == 0
