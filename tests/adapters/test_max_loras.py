"""Adapters that are loaded from their folders when they are asked for, few at a time, and those that come and go meanwhile."""

import copy
import random
import shutil
import threading

import accelerate
import peft
import pytest
import torch

import paged_cache
from paged_cache import ContinuousBatcher, PagedCache
from paged_cache.errors import InvalidRequestError
from paged_cache.integrations.lora import adapter_folders
from tests.adapters.zoo import (
    ATTENTION,
    BASE,
    GREEDY,
    MLP,
    Zoo,
    assert_same_state,
    expected,
    lora,
    make,
    state_of,
)
from tests.batching.alone import differences, finish, prompt, tiny
from tests.models import assert_whole, poisoned_pool

KINDS = {
    "a": lora(ATTENTION),
    "b": lora(MLP, r=2),
    "c": lora("all-linear", r=3),
    "d": lora(ATTENTION, use_dora=True),
    "e": lora(modules_to_save=["lm_head"]),
}
NAMES = list(KINDS)
SIX = [*KINDS, "user"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of adapters, and what the model gives under each for two prompts; "user" is one that is loaded already."""
    folder = tmp_path_factory.mktemp("adapters")
    of = make(Zoo(grouped={"user": lora()} | KINDS))
    of.save_pretrained(folder, selected_adapters=SIX)
    want = {(name, length): expected(of, prompt(length), name, **GREEDY) for name in [*SIX, BASE] for length in (9, 22)}
    assert len({str(rows) for rows in want.values()}) == len(want)
    return folder, want


def fresh(folder):
    """The model as its user loads it, with one adapter."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(tiny("llama")), folder / "user", adapter_name="user").eval()


def modules(folder, names=NAMES):
    """Those that the batcher loads itself."""
    return {name: path for name, path in adapter_folders(folder).items() if name in names}


class Serving:
    """A batcher with registered folders; what it answers is compared with what adapters give alone."""

    def __init__(self, of, want, **settings):
        self.of, self.want = of, want
        self.pool = poisoned_pool(of)
        self.batcher = ContinuousBatcher(of, self.pool, max_num_seqs=12, max_num_batched_tokens=48, **settings)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.batcher.close()

    @property
    def loaded(self):
        """Registered adapters that are in memory: as many as there are in the model besides the user's."""
        names = set(self.batcher.stats().loaded_adapters)
        assert len(names) == len(set(getattr(self.of, "peft_config", {})) - {"user"})
        return names

    def __call__(self, *names, length=9):
        outputs = self.batcher.generate(
            [prompt(length)] * len(names), adapter_names=list(names), progress_bar=False, **GREEDY
        )
        assert not differences(outputs, [self.want[name, length] for name in names])
        return [output.cached_tokens for output in outputs]


def test_loaded_on_first_use(saved):
    """Nothing is loaded before it is asked for, and nothing is left on the model in the end."""
    folder, want = saved
    of = fresh(folder)
    before = state_of(of)
    with Serving(of, want, lora_modules=modules(folder), max_loras=8) as serve:
        assert serve.loaded == set()
        serve("user", BASE)
        assert serve.loaded == set()
        serve("b")
        assert serve.loaded == {"b"}
        serve("a", "b", "d", BASE, "user")
        assert serve.loaded == {"a", "b", "d"}
        serve("e", "c", "a")
    assert_whole(serve.pool)
    assert_same_state(before, state_of(of))


def test_the_least_recently_used_goes(saved):
    """At most `max_loras` registered ones are in memory; the one that was not used for longest makes room."""
    folder, want = saved
    with Serving(fresh(folder), want, lora_modules=modules(folder), max_loras=2) as serve:
        seen = []
        for name in ("a", "b", "a", "c", "a", "b", "e", "b", "d"):
            serve(name)
            seen.append(serve.loaded)
    assert seen == [
        {"a"},
        {"a", "b"},
        {"a", "b"},
        {"a", "c"},
        {"a", "c"},
        {"a", "b"},
        {"b", "e"},
        {"b", "e"},
        {"b", "d"},
    ]


def test_a_model_without_adapters(saved):
    """It is wrapped while adapters are in it, whichever of them comes or goes first, and then it is itself again."""
    folder, want = saved
    of = copy.deepcopy(tiny("llama"))
    before = state_of(of)
    with Serving(of, want, lora_modules=modules(folder), max_loras=2) as serve:
        for names in ("a", "b", "c", "a", "d", "e", "b"):
            serve(*names, BASE)
        assert serve.batcher.stats().loaded_adapters == ("e", "b")
        assert serve.batcher.stats().num_adapter_loads == 7
        (output,) = serve.batcher.generate([prompt(9)], progress_bar=False, **GREEDY)
        assert not differences([output], [want[BASE, 9]])
    assert_whole(serve.pool)
    assert_same_state(before, state_of(of))


@pytest.mark.parametrize("max_loras", [1, 2, 3])
def test_more_adapters_than_fit(saved, max_loras):
    """Requests for more adapters than run at once are all served, a few adapters at a time, user's and base among them."""
    folder, want = saved
    of = fresh(folder)
    names = [*NAMES, "user", BASE, *reversed(NAMES), "user", *NAMES, BASE]
    with Serving(of, want, lora_modules=modules(folder), max_loras=max_loras) as serve:
        handles = [serve.batcher.submit(prompt(9), adapter_name=name, **GREEDY) for name in names]
        most = 0
        while serve.batcher.step():
            most = max(most, len(serve.loaded))
            assert "user" in of.peft_config
            serve.pool.check()
        outputs = [handle.result(timeout=0) for handle in handles]
    assert not differences(outputs, [want[name, 9] for name in names])
    assert most == max_loras


def test_prefixes_survive_eviction(saved):
    """An adapter that is loaded again has the prefixes that it left."""
    folder, want = saved
    with Serving(fresh(folder), want, lora_modules=modules(folder), max_loras=1) as serve:
        assert serve("a", length=22) == [0]
        assert serve("b", length=22) == [0]
        assert serve.loaded == {"b"}
        assert serve("a", length=22) == [20]
        assert serve(BASE, length=22) == [0]


def test_registered_and_dropped_while_it_runs(saved):
    """A name is known from `register_adapter` to `drop_adapter`, and may then be another adapter's."""
    folder, want = saved
    with Serving(fresh(folder), want, lora_modules=modules(folder, ["a"]), max_loras=2) as serve:
        handle = serve.batcher.submit(prompt(22), adapter_name="a", **GREEDY)
        serve.batcher.step()
        with pytest.raises(InvalidRequestError, match="'b'"):
            serve.batcher.submit(prompt(9), adapter_name="b", **GREEDY)
        serve.batcher.register_adapter("b", folder / "b")
        other = serve.batcher.submit(prompt(9), adapter_name="b", **GREEDY)
        assert not differences(finish(serve.batcher, [handle, other]), [want["a", 22], want["b", 9]])
        serve.batcher.drop_adapter("b")
        assert serve.loaded == {"a"}
        with pytest.raises(InvalidRequestError, match="'b'"):
            serve.batcher.submit(prompt(9), adapter_name="b", **GREEDY)
        serve("a")
        serve.batcher.register_adapter("b", folder / "c")
        (output,) = serve.batcher.generate([prompt(9)], adapter_names=["b"], progress_bar=False, **GREEDY)
        assert not differences([output], [want["c", 9]])


def test_a_folder_that_changed(saved, tmp_path):
    """Registered anew under its name, an adapter has the new weights, and none of the old prefixes."""
    folder, want = saved
    shutil.copytree(folder / "a", tmp_path / "x")
    with Serving(fresh(folder), want, lora_modules={"x": tmp_path / "x"}, max_loras=2) as serve:
        serve.want = want | {("x", 22): want["a", 22]}
        assert serve("x", length=22) == [0]
        serve.batcher.drop_adapter("x")
        shutil.rmtree(tmp_path / "x")
        shutil.copytree(folder / "b", tmp_path / "x")
        serve.batcher.register_adapter("x", tmp_path / "x")
        serve.want = want | {("x", 22): want["b", 22]}
        assert serve("x", length=22) == [0]
        assert serve("x", length=22) == [20]


def without_weights(folder):
    """Only the configuration."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def cut(folder):
    """Half of the weights' file."""
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_json(folder):
    """A configuration that is none."""
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")


def other_modules(folder):
    """An adapter for a model of another kind."""
    path = folder / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("q_proj", "query_key_value"), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    for name in ("k_proj", "v_proj", "o_proj"):
        text = text.replace(f'"{name}"', '"query_key_value"')
    path.write_text(text, encoding="utf-8")


def gone(folder):
    """Nothing is there any more."""
    shutil.rmtree(folder)


@pytest.mark.parametrize("spoil", [without_weights, cut, no_json, other_modules, gone], ids=lambda x: x.__name__)
def test_bad_folders(saved, tmp_path, spoil):
    """Whoever asks for an adapter that cannot be loaded gets the reason; the others, and the model, do not notice."""
    folder, want = saved
    shutil.copytree(folder / "a", tmp_path / "bad")
    of = fresh(folder)
    before = state_of(of)
    with Serving(of, want, lora_modules=modules(folder) | {"bad": tmp_path / "bad"}, max_loras=2) as serve:
        spoil(tmp_path / "bad")
        names = ["a", "bad", BASE, "bad", "user", "b"]
        handles = [serve.batcher.submit(prompt(9), adapter_name=name, **GREEDY) for name in names]
        outputs = finish(serve.batcher, handles)
        for name, output in zip(names, outputs, strict=True):
            if name == "bad":
                assert output.finish_reason in ("error", "rejected")
                assert "bad" in str(output.error)
            else:
                assert not differences([output], [want[name, 9]])
        assert "bad" not in of.peft_config
        serve("a", "b", "user", BASE)
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(folder / "c", tmp_path / "bad")
        serve.want = want | {("bad", 9): want["c", 9]}
        serve("bad", "a")
    assert_whole(serve.pool)
    assert_same_state(before, state_of(of))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_loras": 0}, "max_loras"),
        ({"max_loras": -1}, "max_loras"),
        ({"max_loras": 1.5}, "max_loras"),
        ({"lora_modules": {"sql": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"lora_modules": {"user": "FOLDER"}}, "user"),
        ({"lora_modules": {"__base__": "FOLDER"}}, "__base__"),
        ({"lora_modules": {3: "FOLDER"}}, "3"),
        ({"lora_modules": {"a.b": "FOLDER"}}, "a.b"),
        ({"lora_modules": ["FOLDER"]}, "lora_modules"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_settings(saved, settings, text):
    """Limits and folders that make no sense are named, and the model stays as it was."""
    folder, _ = saved
    of = fresh(folder)
    before = state_of(of)
    given = settings.get("lora_modules")
    if isinstance(given, dict):
        settings = {"lora_modules": {name: path.replace("FOLDER", str(folder / "a")) for name, path in given.items()}}
    elif given is not None:
        settings = {"lora_modules": [folder / "a"]}
    pool = poisoned_pool(of)
    with pytest.raises((InvalidRequestError, TypeError), match=text):
        ContinuousBatcher(of, pool, **settings)
    assert_same_state(before, state_of(of))


def test_unknown_names(saved):
    """They are rejected at submit, with those that there are; dropping one that is none is refused, too."""
    folder, want = saved
    with Serving(fresh(folder), want, lora_modules=modules(folder, ["a", "b"]), max_loras=2) as serve:
        for act in (
            lambda: serve.batcher.submit(prompt(9), adapter_name="sql"),
            lambda: serve.batcher.generate([prompt(9)] * 2, adapter_names=["a", "sql"], progress_bar=False),
        ):
            with pytest.raises(InvalidRequestError, match=r"'sql'.*\ba\b.*\bb\b"):
                act()
        for name in ("sql", "user", BASE):
            with pytest.raises(InvalidRequestError, match=name):
                serve.batcher.drop_adapter(name)
        assert serve.batcher.stats().num_steps == 0
        serve("a", "user")


class Chaos:
    """Requests come and are cancelled, adapters are registered and dropped, at random."""

    def __init__(self, batcher, folders, others, dice):
        self.batcher, self.folders, self.others, self.dice = batcher, folders, others, dice
        self.known, self.requests = set(), []

    def act(self):
        """One event, most often a request."""
        (act,) = self.dice.choices([self.register, self.drop, self.cancel, self.submit, int], [6, 5, 4, 55, 30])
        act()

    def register(self):
        in_use = {name for name, _, handle in self.requests if not handle.done}
        for name in sorted(self.folders.keys() - self.known - in_use)[:1]:
            self.batcher.register_adapter(name, self.folders[name])
            self.known.add(name)

    def drop(self):
        for name in self.dice.sample(sorted(self.known), min(len(self.known), 1)):
            self.batcher.drop_adapter(name)
            self.known.remove(name)

    def cancel(self):
        for _, _, handle in self.dice.sample(self.requests, min(len(self.requests), 1)):
            handle.cancel()

    def submit(self):
        name, length = self.dice.choice([*sorted(self.known), *self.others]), self.dice.choice((9, 22))
        options = GREEDY | {"expected_tokens": self.dice.choice((1, 6))}
        self.requests.append((name, length, self.batcher.submit(prompt(length), adapter_name=name, **options)))


@pytest.mark.parametrize(("seed", "has_user"), [(0, True), (1, True), (2, False)])
def test_anything_at_any_time(saved, seed, has_user):
    """Each request has its adapter's tokens, whatever comes, goes and is dropped beside it, when blocks and places are few."""
    folder, want = saved
    of = fresh(folder) if has_user else copy.deepcopy(tiny("llama"))
    before = state_of(of)
    pool = poisoned_pool(of, num_blocks=14)
    settings = {"max_num_seqs": 12, "max_num_batched_tokens": 24, "max_loras": 2, "policy": "fcfs"}
    with ContinuousBatcher(of, pool, **settings) as batcher:
        others = ["user", BASE] if has_user else [BASE]
        chaos = Chaos(batcher, modules(folder), others, random.Random(seed))
        for _ in range(200):
            chaos.act()
            batcher.step()
            pool.check()
        finish(batcher)
        stats, requests = batcher.stats(), chaos.requests
    outputs = [(name, length, handle.result(timeout=0)) for name, length, handle in requests]
    over = [(output, want[name, length]) for name, length, output in outputs if output.finish_reason == "length"]
    assert not differences(*zip(*over, strict=True))
    assert len(over) > 60
    assert {output.finish_reason for _, _, output in outputs} == {"length", "abort"}
    assert stats.num_adapter_loads > 5
    assert stats.num_preemptions > 0
    del batcher, chaos, requests
    assert_whole(pool)
    assert_same_state(before, state_of(of))


def test_names_are_a_batchers_own(saved):
    """Two batchers on one model may call different adapters alike; neither knows what the other one has registered."""
    folder, want = saved
    of = fresh(folder)
    with (
        Serving(of, want, lora_modules={"x": folder / "a"}) as first,
        Serving(of, want, lora_modules={"x": folder / "b", "y": folder / "c"}) as second,
    ):
        first.want = want | {("x", 9): want["a", 9]}
        second.want = want | {("x", 9): want["b", 9], ("y", 9): want["c", 9]}
        first("x", BASE)
        second("x", "y", "user")
        first("x")
        with pytest.raises(InvalidRequestError, match="'y'"):
            first.batcher.submit(prompt(9), adapter_name="y", **GREEDY)
        handle = second.batcher.submit(prompt(9), adapter_name="x", **GREEDY)
        second.batcher.step()
        first.batcher.close()
        assert not differences(finish(second.batcher, [handle]), [want["b", 9]])


@pytest.mark.parametrize("name", ["1", "7", "model", "weight", "half"])
def test_any_name_will_do(saved, name):
    """peft looks for names inside the names of weights, and keeps adapters as attributes: requests need not know."""
    folder, want = saved
    with Serving(fresh(folder), want | {(name, 9): want["a", 9]}, lora_modules={name: folder / "a"}) as serve:
        serve(name, BASE, "user")


def test_an_adapter_that_was_deleted_behind_the_batchers_back(saved):
    """It is loaded again; a request of it that runs ends with an error; dropping and closing go on as ever."""
    folder, want = saved
    of = fresh(folder)
    with Serving(of, want, lora_modules=modules(folder, ["a", "b"])) as serve:
        serve("a", "b")
        (key,) = [key for key, adapter in serve.batcher._adapters._by_key.items() if adapter.name == "a"]
        of.delete_adapter(key)
        serve("a", "b")
        handles = [serve.batcher.submit(prompt(9), adapter_name=name, **GREEDY) for name in "ab"]
        serve.batcher.step()
        of.delete_adapter(key)
        outputs = finish(serve.batcher, handles)
        assert outputs[0].finish_reason == "error"
        assert not differences(outputs[1:], [want["b", 9]])
        serve.batcher.drop_adapter("a")
        serve("b")


def test_a_request_that_was_accepted_is_served(saved):
    """Dropped by another thread in the middle of a step, an adapter stays for the requests that named it before."""
    folder, want = saved
    with Serving(fresh(folder), want, lora_modules=modules(folder, ["a", "b"])) as serve:
        busy = serve.batcher.submit(prompt(22), adapter_name="b", **GREEDY)
        handle = serve.batcher.submit(prompt(9), adapter_name="a", **GREEDY)
        serve.batcher._adapters.drop("a")
        serve.batcher._adapters.sweep()  # as a step does while the request is in the inbox
        assert not differences(finish(serve.batcher, [busy, handle]), [want["b", 22], want["a", 9]])
        assert serve.loaded == {"b"}


def test_interrupted_while_loading(saved, monkeypatch):
    """Ctrl-C while an adapter is loaded leaves nothing of it, and its request is served in the next steps."""
    folder, want = saved
    of = fresh(folder)
    before = state_of(of)
    with Serving(of, want, lora_modules=modules(folder, ["a"])) as serve:
        loader, load = serve.batcher._adapters._loader, serve.batcher._adapters._loader.load

        def interrupted(*args):
            load(*args)
            raise KeyboardInterrupt

        handle = serve.batcher.submit(prompt(9), adapter_name="a", **GREEDY)
        monkeypatch.setattr(loader, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serve.batcher.step()
        monkeypatch.undo()
        assert serve.loaded == set()
        assert not differences(finish(serve.batcher, [handle]), [want["a", 9]])
    assert_same_state(before, state_of(of))


def test_folders_for_a_model_whose_weights_are_elsewhere(saved):
    """peft would leave the adapter's weights empty: it is refused before any work."""
    folder, _ = saved
    of = accelerate.cpu_offload(copy.deepcopy(tiny("llama")))
    with pytest.raises(InvalidRequestError, match="offloaded"):
        ContinuousBatcher(of, poisoned_pool(of), lora_modules=modules(folder))


def test_two_batchers_in_two_threads(saved):
    """Both compute with the adapters of one model at the same time, and so does `generate`: nobody sees what another has active."""
    folder, want = saved
    of = fresh(folder)
    before = state_of(of)
    wrong, pool = [], poisoned_pool(of)

    def serve(names):
        try:
            with Serving(of, want, lora_modules=modules(folder)) as batcher:
                for _ in range(6):
                    batcher(*names)
        except BaseException as error:  # noqa: BLE001 (the test shall see it)
            wrong.append(error)

    def generate():
        ids = torch.tensor([prompt(9)])
        for _ in range(12):
            tokens = of.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=PagedCache(pool), **GREEDY)
            if tokens[:, 9:].tolist() != want["user", 9]:
                wrong.append(tokens)

    with paged_cache.patch(of):
        threads = [threading.Thread(target=serve, args=(names,)) for names in (("a", BASE, "b"), ("c", "a", "user"))]
        threads.append(threading.Thread(target=generate))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not wrong
    assert_same_state(before, state_of(of))
