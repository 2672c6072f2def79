"""Prefixes under adapters: never shared across them, found again by what adapters are rather than by their names."""

import warnings

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

from paged_cache import BlockPool, ContinuousBatcher
from tests.adapters.zoo import ATTENTION, BASE, GREEDY, MLP, ZOOS, Zoo, expected, lora, make, strengthen
from tests.batching.alone import prompt
from tests.models import poisoned_pool

LENGTH = 22
FULL = 20  # in blocks of 4, but for the last token, which is always computed
TWO = {"sql": lora(ATTENTION), "chat": lora(MLP)}


def two():
    """A model with two adapters."""
    return make(Zoo(grouped=TWO))


class Asking:
    """Asks one prompt under adapters, by an open batcher; each answer is compared with that of `generate`."""

    def __init__(self, of):
        self.of, self.ids = of, prompt(LENGTH)
        self.pool = poisoned_pool(of)
        self.batcher = ContinuousBatcher(of, self.pool, max_num_seqs=8, max_num_batched_tokens=64)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.batcher.close()

    def __call__(self, *names, ids=None):
        """How many tokens of the prompt the pool had, for each name."""
        ids = self.ids if ids is None else ids
        outputs = self.batcher.generate([ids] * len(names), adapter_names=list(names), progress_bar=False, **GREEDY)
        self.pool.check()
        for name, output in zip(names, outputs, strict=True):
            assert output.error is None, output.error
            assert output.sequences == expected(self.of, ids, name, **GREEDY)
        return [output.cached_tokens for output in outputs]


def tensors_of(of, name):
    """All that one adapter is, by path."""
    return {path: x for path, x in of.named_parameters() if name in path.split(".")}


@pytest.mark.parametrize("name", ZOOS)
def test_keys_say_what_an_adapter_is(name):
    """Any bit of an adapter counts for rows with it and for no others; the same bits give the same key again."""
    of = make(ZOOS[name])
    names = [*of.peft_config, BASE]
    pool = BlockPool.for_model(of, num_blocks=40, block_size=4)

    def keys():
        return {name: pool.root_key(None, 0, adapter_name=name) for name in names}

    first = keys()
    assert None not in first.values()
    assert len(set(first.values())) == len(names)
    for adapter in names[:-1]:
        tensors = tensors_of(of, adapter)
        assert tensors
        for path, tensor in tensors.items():
            place = tuple(size // 2 for size in tensor.shape)
            value = tensor.data[place].clone()
            tensor.data[place] += 1e-3
            changed = keys()
            assert [x for x in names if changed[x] != first[x]] == [adapter], path
            tensor.data[place] = value
        assert keys() == first


@pytest.mark.parametrize("name", ["llama", "llama, special", "ia3", "mixtral, experts"])
def test_keys_of_active_adapters(name):
    """Without a name the active adapters count, and none of them while they are disabled."""
    of = make(ZOOS[name])
    pool = BlockPool.for_model(of, num_blocks=40, block_size=4)
    for adapter in of.peft_config:
        of.set_adapter(adapter)
        assert pool.root_key(None, 0) == pool.root_key(None, 0, adapter_name=adapter)
        with of.disable_adapter():
            assert pool.root_key(None, 0) == pool.root_key(None, 0, adapter_name=BASE)
            assert pool.root_key(None, 0, adapter_name=adapter) != pool.root_key(None, 0, adapter_name=BASE)


def test_each_adapter_has_its_own_prefixes():
    """Nothing crosses adapters, in one batch or in two, and all is found again after switching back."""
    of = two()
    with Asking(of) as ask:
        assert ask("sql", "chat", BASE) == [0, 0, 0]
        assert ask(BASE, "sql", "chat") == [FULL] * 3
        of.set_adapter("chat")
        assert ask("sql", None, BASE) == [FULL] * 3
        ask.pool.clear_prefix_cache()
        assert ask("sql") == [0]
        assert ask(BASE, "chat", "sql") == [0, 0, FULL]


def test_set_adapter_between_calls():
    """Rows without a name find what rows of the active adapter left, also of several at once."""
    of = two()
    with Asking(of) as ask:
        assert ask(None) == [0]
        of.set_adapter("chat")
        assert ask(None, "sql") == [0, FULL]
        of.base_model.set_adapter(["sql", "chat"])
        assert ask(None) == [0]
        assert ask(None, "sql", "chat") == [FULL] * 3
        of.set_adapter("sql")
        assert ask(None) == [FULL]
        with of.disable_adapter():
            assert ask(None) == [0]
            assert ask(BASE) == [FULL]


def test_other_adapters_come_and_go():
    """Adding, loading, training and deleting one leaves the prefixes of the others."""
    of = two()
    with Asking(of) as ask:
        assert ask("sql", BASE) == [0, 0]
        of.add_adapter("c", lora("all-linear", r=2))
        of.eval()
        strengthen(of, only="c")
        assert ask("sql", BASE, "c") == [FULL, FULL, 0]
        with torch.no_grad():
            next(iter(tensors_of(of, "chat").values())).add_(0.1)
        assert ask("sql", BASE, "c") == [FULL] * 3
        of.delete_adapter("chat")
        assert ask("sql", BASE, "c") == [FULL] * 3


def test_deleted_and_added_again():
    """The same name with other weights finds nothing; with the same weights it finds what it left."""
    of = two()
    with Asking(of) as ask:
        assert ask("sql") == [0]
        weights = {path: x.detach().clone() for path, x in tensors_of(of, "sql").items()}
        of.set_adapter("chat")
        of.delete_adapter("sql")
        of.add_adapter("sql", lora(ATTENTION))
        of.eval()
        strengthen(of, seed=7, only="sql")
        assert ask("sql") == [0]
        with torch.no_grad():
            for path, x in tensors_of(of, "sql").items():
                x.copy_(weights[path])
        assert ask("sql") == [FULL]


def test_same_weights_under_other_names():
    """What two adapters with equal weights compute is the same, and shared; a stronger copy has its own."""
    of = two()
    of.add_adapter("twin", lora(ATTENTION))
    of.add_adapter("strong", lora(ATTENTION, lora_alpha=16))
    with torch.no_grad():
        for path, x in tensors_of(of, "sql").items():
            for name in ("twin", "strong"):
                of.get_parameter(path.replace(".sql.", f".{name}.")).copy_(x)
    of.eval()
    with Asking(of) as ask:
        assert ask("sql") == [0]
        assert ask("twin")[0] in (0, FULL)  # a key may hold the name
        assert ask("strong") == [0]


def test_hotswap(tmp_path):
    """peft's hot-swap copies other weights over an adapter; the old prefixes wait for the old weights."""
    of = two()
    of.save_pretrained(tmp_path / "old", selected_adapters=["sql"])
    other = make(Zoo(grouped={"sql": lora(ATTENTION, lora_alpha=24)}), seed=3)
    other.save_pretrained(tmp_path / "new")
    with Asking(of) as ask:
        assert ask("sql", "chat") == [0, 0]
        hotswap_adapter(of, tmp_path / "new" / "sql", "sql")
        assert ask("sql", "chat") == [0, FULL]
        hotswap_adapter(of, tmp_path / "old" / "sql", "sql")
        assert ask("sql", "chat") == [FULL, FULL]


@pytest.mark.parametrize("alpha", [16, 24])
@pytest.mark.parametrize("active", ["sql", "chat"])
def test_hotswap_under_way(tmp_path, active, alpha):
    """What a row computes after its adapter was exchanged is not taken for what the earlier weights give."""
    of = two()
    of.set_adapter(active)
    of.save_pretrained(tmp_path / "old", selected_adapters=["sql"])
    make(Zoo(grouped={"sql": lora(ATTENTION, lora_alpha=alpha)}), seed=3).save_pretrained(tmp_path / "new")
    with Asking(of) as ask:
        handle = ask.batcher.submit(ask.ids, adapter_name="sql", **(GREEDY | {"max_new_tokens": 20}))
        for _ in range(3):
            ask.batcher.step()
        hotswap_adapter(of, tmp_path / "new" / "sql", "sql")
        while ask.batcher.step():
            pass
        longer = ask.ids + handle.result(timeout=0).generated_tokens
        for folder in ("old", "new"):
            hotswap_adapter(of, tmp_path / folder / "sql", "sql")
            ask("sql", ids=longer)


def test_scaling():
    """A stronger adapter is another one; the old strength has the old prefixes."""
    of = two()
    layers = [
        layer for layer in of.modules() if isinstance(layer, peft.tuners.lora.LoraLayer) and "sql" in layer.scaling
    ]
    with Asking(of) as ask:
        assert ask("sql", BASE) == [0, 0]
        for layer in layers:
            layer.scaling["sql"] *= 2
        assert ask("sql", BASE) == [0, FULL]
        for layer in layers:
            layer.scaling["sql"] /= 2
        assert ask("sql", BASE) == [FULL, FULL]


def test_merge_and_unmerge():
    """Merged weights are other weights; after unmerging, which rounds, they are again others."""
    of = two()
    with Asking(of) as ask, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        assert ask("sql", BASE) == [0, 0]
        of.merge_adapter(["chat"])
        assert ask(None) == [0]
        of.unmerge_adapter()
        first = ask("sql")
        assert first == [0]
        assert ask("sql") == [FULL]


def test_weighted_combinations():
    """One that is made again with other weights is another one."""
    of = make(Zoo(grouped={"sql": lora(ATTENTION), "chat": lora(ATTENTION, lora_alpha=32)}))
    with Asking(of) as ask:
        found = []
        for weights in ([0.7, 0.5], [0.2, 0.9], [0.7, 0.5]):
            of.add_weighted_adapter(["sql", "chat"], weights, "mix", combination_type="linear")
            of.eval()
            found += ask("mix")
            of.set_adapter("sql")
            of.delete_adapter("mix")
        assert found == [0, 0, FULL]
        assert ask("sql", "chat") == [0, 0]


def test_salts_and_adapters():
    """A tenant's prefixes are its own under each adapter."""
    of = two()
    pool = poisoned_pool(of)
    cached = {}
    with ContinuousBatcher(of, pool) as batcher:
        for _ in range(2):
            for salt in ("x", "y"):
                for name in ("sql", BASE):
                    (output,) = batcher.generate(
                        [prompt(LENGTH)], adapter_names=[name], cache_salt=salt, progress_bar=False, **GREEDY
                    )
                    cached.setdefault((salt, name), []).append(output.cached_tokens)
    assert set(map(tuple, cached.values())) == {(0, FULL)}
