"""Rows of one batch with different adapters: each gets what its prompt gives alone when its adapter is the active one."""

import warnings

import pytest

from paged_cache import ContinuousBatcher
from paged_cache.errors import InvalidRequestError
from tests.adapters.zoo import (
    ATTENTION,
    BASE,
    GREEDY,
    MLP,
    ZOOS,
    Zoo,
    assert_same_state,
    expected,
    lora,
    make,
    mixed,
    state_of,
)
from tests.batching.alone import differences, finish, prompt, tiny
from tests.models import assert_whole, poisoned_pool

LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 40}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 5}
BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
SEARCHES = [GREEDY, SAMPLED, BEAMS]


class ForwardCounter:
    """Counts the calls of the transformers model inside, per step of a batcher."""

    def __init__(self, of):
        self.calls, self._model = 0, of.get_base_model() if hasattr(of, "get_base_model") else of

    def __enter__(self):
        self._hook = self._model.register_forward_pre_hook(self._count)
        return self

    def _count(self, module, args):
        self.calls += 1

    def __exit__(self, *error):
        self._hook.remove()


def run(of, requests, **settings):
    """Serves `(ids, name, options)`; outputs, statistics, and the forwards of the step with the most."""
    pool = poisoned_pool(of, num_blocks=settings.pop("num_blocks", 600))
    most = 0
    with ContinuousBatcher(of, pool, **(LIMITS | settings)) as batcher, ForwardCounter(of) as counter:
        handles = [batcher.submit(ids, adapter_name=name, **options) for ids, name, options in requests]
        while True:
            before = counter.calls
            has_work = batcher.step()
            pool.check()
            most = max(most, counter.calls - before)
            if not has_work:
                break
        outputs, stats = [handle.result(timeout=0) for handle in handles], batcher.stats()
    del batcher, handles
    assert_whole(pool)
    return outputs, stats, most


def check(of, requests, **settings):
    """Serves requests, each compared with itself alone; statistics and most forwards of a step."""
    want = [expected(of, ids, name, **options) for ids, name, options in requests]
    before = state_of(of)
    outputs, stats, most = run(of, requests, **settings)
    assert not differences(outputs, want)
    assert [output.adapter_name for output in outputs] == [name for _, name, _ in requests]
    assert_same_state(before, state_of(of))
    return want, stats, most


@pytest.mark.parametrize("name", ZOOS)
def test_rows_are_what_they_are_alone(name):
    """Greedy rows of all adapters and of none, in one batch; nothing of it is left on the model."""
    zoo = ZOOS[name]
    of = make(zoo)
    names = [*zoo.grouped, *zoo.exact]
    requests = [(ids, adapter, GREEDY) for ids, adapter in mixed(names)]
    want, _, most = check(of, requests, max_num_batched_tokens=100)

    different = {str(rows) for rows in want[: len(names) + 1]}
    assert len(different) == len(names) + 1, "an adapter has no effect that shows"
    is_whole = tiny(zoo.model).config.model_type not in ("bloom", "qwen3_next") if zoo.model != "tied" else True
    if is_whole:
        assert most == len(zoo.exact) + 1, "grouped adapters and none take one forward, each other one takes its own"
    else:
        assert most > 1


@pytest.mark.parametrize("search", [SAMPLED, BEAMS], ids=["sampled", "beams"])
@pytest.mark.parametrize("name", ["llama", "llama, special", "gpt2", "mistral", "qwen3_next", "vera"])
def test_ways_of_choosing(name, search):
    """Sampling with a seed and beams give what they give alone under the adapter, beside greedy rows of others."""
    zoo = ZOOS[name]
    of = make(zoo)
    pairs = mixed([*zoo.grouped, *zoo.exact])
    requests = [(ids, adapter, (search, GREEDY)[i % 2]) for i, (ids, adapter) in enumerate(pairs)]
    want, stats, _ = check(of, requests, max_num_seqs=24)

    assert len({str(rows) for rows in want}) > len(want) // 2
    assert stats.num_preemptions == 0


@pytest.mark.parametrize("name", ["llama", "llama, special", "mistral"])
def test_few_blocks(name):
    """Requests that lose their blocks and begin again keep to their adapters."""
    zoo = ZOOS[name]
    of = make(zoo)
    pairs = mixed([*zoo.grouped, *zoo.exact])
    long = {"max_new_tokens": 24, "expected_tokens": 1}  # a forecast that is too low, so that blocks run out
    requests = [(ids, adapter, (GREEDY, SAMPLED)[i % 2] | long) for i, (ids, adapter) in enumerate(pairs)]
    _, stats, _ = check(of, requests, num_blocks=10 if name == "mistral" else 20)

    assert stats.num_preemptions > 0


def test_rows_without_a_name_have_the_active_adapters():
    """Also several at once, beside rows that name one of them; `set_adapter` between two calls is seen."""
    of = make(Zoo(grouped={"a": lora(ATTENTION), "b": lora(MLP, r=2), "c": lora()}))
    of.base_model.set_adapter(["a", "b"])
    ids = prompt(9)
    requests = [(ids, name, GREEDY) for name in (None, "a", "b", "c", BASE)]
    want, _, most = check(of, requests)

    assert len({str(rows) for rows in want}) == 5
    assert most == 1
    of.set_adapter("c")
    want, _, _ = check(of, requests)
    assert want[0] == want[3]
    with of.disable_adapter():
        assert check(of, requests[:1])[0] == want[4:]


def test_weighted_combinations():
    """What peft makes of several adapters is one more."""
    of = make(Zoo(grouped={"a": lora(ATTENTION), "b": lora(ATTENTION, lora_alpha=32), "c": lora(ATTENTION, r=6)}))
    of.add_weighted_adapter(["a", "b"], [0.7, 0.5], "linear", combination_type="linear")
    of.add_weighted_adapter(["a", "c"], [1.0, -0.5], "cat", combination_type="cat")
    of.add_weighted_adapter(["b", "c"], [0.6, 0.6], "svd", combination_type="svd", svd_rank=3)
    requests = [(ids, name, GREEDY) for ids, name in mixed(list(of.peft_config))]
    want, _, most = check(of, requests)

    assert len({str(rows) for rows in want[:7]}) == 7
    assert most == 1


def test_adapters_of_transformers():
    """A model with adapters that transformers' own `add_adapter` put in, without a `PeftModel` around it."""
    import copy

    from tests.adapters.zoo import strengthen

    of = copy.deepcopy(tiny("llama"))
    of.add_adapter(lora(ATTENTION), "a")
    of.add_adapter(lora(MLP, r=2), "b")
    strengthen(of)
    of.eval()
    ids = prompt(9)
    want = {}
    for name in ("a", "b"):
        of.set_adapter(name)
        want[name] = expected(of, ids, None, **GREEDY)
    of.disable_adapters()
    want[BASE] = expected(of, ids, None, **GREEDY)
    of.enable_adapters()
    of.set_adapter("a")
    want[None] = want["a"]

    before = state_of(of)
    outputs, _, most = run(of, [(ids, name, GREEDY) for name in want])
    assert not differences(outputs, list(want.values()))
    assert len({str(rows) for rows in want.values()}) == 3
    assert most == 1
    assert_same_state(before, state_of(of))


def test_generate_takes_a_name_for_each_prompt():
    """A list has one for each prompt, a single name is for all, and the outputs say which it was."""
    of = make(Zoo(grouped={"a": lora(ATTENTION), "b": lora(MLP)}))
    names, ids = ["b", BASE, "a", "b"], [prompt(5), prompt(9), prompt(9), prompt(9)]
    want = [expected(of, *pair, **GREEDY) for pair in zip(ids, names, strict=True)]
    pool = poisoned_pool(of)
    with ContinuousBatcher(of, pool, **LIMITS) as batcher:
        outputs = batcher.generate(ids, adapter_names=names, progress_bar=False, **GREEDY)
        assert not differences(outputs, want)
        assert [output.adapter_name for output in outputs] == names
        outputs = batcher.generate(ids[:1], adapter_names="b", progress_bar=False, **GREEDY)
        assert not differences(outputs, want[:1])


def test_generate_of_the_model_is_untouched_meanwhile():
    """While a batcher is open and between its steps, `set_adapter`, and the model itself, work as ever."""
    of = make(Zoo(grouped={"a": lora(ATTENTION), "b": lora(MLP)}))
    ids = prompt(9)
    want = {name: expected(of, ids, name, **GREEDY) for name in ("a", "b", BASE)}
    with ContinuousBatcher(of, poisoned_pool(of), **LIMITS) as batcher:
        handles = [batcher.submit(ids, adapter_name=name, **GREEDY) for name in want]
        for _ in range(3):
            batcher.step()
            assert {name: expected(of, ids, name, **GREEDY) for name in want} == want
        assert not differences(finish(batcher, handles), list(want.values()))


@pytest.mark.parametrize(
    ("names", "text"),
    [(["a"], "adapter_name.*1.*2"), (["a", "sql"], "sql"), (["a", 3], "3"), ("sql", "sql"), (["a", ""], "''")],
)
def test_wrong_names(names, text):
    """Too few names, and names that are none, are refused before anything is begun."""
    of = make(Zoo(grouped={"a": lora(ATTENTION)}))
    with ContinuousBatcher(of, poisoned_pool(of), **LIMITS) as batcher:
        with pytest.raises((InvalidRequestError, TypeError), match=text):
            batcher.generate([prompt(5), prompt(6)], adapter_names=names, progress_bar=False, **GREEDY)
        assert batcher.stats().num_waiting == batcher.stats().num_steps == 0


def test_models_without_adapters():
    """A name is refused, but for that of no adapter."""
    of = tiny("llama")
    want = [expected(of, prompt(5), None, **GREEDY)]
    with ContinuousBatcher(of, poisoned_pool(of), **LIMITS) as batcher:
        with pytest.raises(InvalidRequestError, match="'sql'"):
            batcher.submit(prompt(5), adapter_name="sql", **GREEDY)
        outputs = batcher.generate([prompt(5)], adapter_names=[BASE], progress_bar=False, **GREEDY)
        assert not differences(outputs, want)


def test_merged_adapters():
    """While one is merged a row cannot name another; rows without a name run with it, and all run after `unmerge`."""
    of = make(Zoo(grouped={"a": lora(ATTENTION), "b": lora(MLP)}))
    ids = prompt(9)
    with ContinuousBatcher(of, poisoned_pool(of), **LIMITS) as batcher:
        of.merge_adapter(["a"])
        for name in ("a", "b", BASE):
            with pytest.raises(InvalidRequestError, match="merge"):
                batcher.submit(ids, adapter_name=name, **GREEDY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            want = expected(of, ids, None, **GREEDY)
        assert not differences(batcher.generate([ids], progress_bar=False, **GREEDY), [want])
        of.unmerge_adapter()
        names = ["b", BASE]
        want = [expected(of, ids, name, **GREEDY) for name in names]
        assert not differences(batcher.generate([ids] * 2, adapter_names=names, progress_bar=False, **GREEDY), want)
