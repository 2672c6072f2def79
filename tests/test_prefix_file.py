"""Prefixes that outlive a process: what a file brings back, what it refuses, and that nothing else comes out of it."""

import copy
import dataclasses
import functools
import gc
import json
import logging
import os
import random
import stat
import tempfile
import textwrap
import threading
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

import paged_cache
from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, PagedCache, prefix_file, saved_prefixes
from paged_cache.memory.layout import LayerSpec
from tests.models import TokenCounter, assert_whole, model, poisoned_pool
from tests.preloaded import run_script

GREEDY = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
PROMPT = torch.randint(10, 80, (1, 43), generator=torch.Generator().manual_seed(9))
OTHER = torch.randint(10, 80, (1, 30), generator=torch.Generator().manual_seed(8))
NUM_FULL = 44  # of 43 + 5 - 1 tokens, those in full blocks of 4


def expected(of, ids=PROMPT):
    """The new tokens of a DynamicCache."""
    return of.generate(ids, **GREEDY, past_key_values=DynamicCache(config=of.config))[:, ids.shape[1] :].tolist()


def generate(of, pool, ids=PROMPT, **kwargs):
    """New tokens, and how many tokens of the prompt entered the model."""
    with paged_cache.patch(of), TokenCounter(getattr(of, "base_model", of)) as counter:
        output = of.generate(ids, **GREEDY, past_key_values=PagedCache(pool, **kwargs))
    return output[:, ids.shape[1] :].tolist(), counter.tokens - GREEDY["max_new_tokens"] + 1


def saved(of, path, *prompts, **kwargs):
    """A pool that computed these prompts and saved them."""
    pool = poisoned_pool(of, **kwargs)
    for ids in prompts or (PROMPT,):
        generate(of, pool, ids)
    pool.save_prefixes(path)
    return pool


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefixes.safetensors"


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    """A file of the tiny llama with PROMPT and OTHER."""
    path = tmp_path_factory.mktemp("prefixes") / "prefixes.safetensors"
    saved(model("llama"), path, PROMPT, OTHER)
    return path


def state_of(pool):
    """All that a refused file must not change."""
    gc.collect()
    pool.manager.check()  # sequences that are gone give their blocks back
    counters = dataclasses.replace(pool.manager.allocator.counters)
    slabs = [layer.keys.clone().nan_to_num(7.0) for layer in pool.storage.layers.values()]
    return pool.num_free, pool.num_cached, counters, len(pool.manager.index), pool.storage.layout, slabs


def assert_refused(pool, path, *parts, **kwargs):
    """The file is refused, the message has these parts, and the pool is as it was."""
    before = state_of(pool)
    with pytest.raises(InvalidRequestError) as refusal:
        pool.load_prefixes(path, **kwargs)
    for part in parts:
        assert part in str(refusal.value)
    after = state_of(pool)
    assert before[:-1] == after[:-1]
    assert all(map(torch.equal, before[-1], after[-1]))
    pool.check()


KINDS = [
    ("llama", {}), ("llama", {"kv_dtype": "int8"}), ("llama", {"kv_dtype": "fp8_e4m3"}), ("llama", {"dtype": torch.float64}),
    ("mistral", {}), ("gemma2", {}), ("gemma2", {"kv_dtype": "int8"}), ("gpt2", {}), ("gpt_oss", {}), ("deepseek_v3", {}),
    ("llama4", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_round_trip(kind, options, path):
    """What one pool computed, another of the same model, of another size, takes from a file: the same bits, the same tokens."""
    of = model(kind)
    pool = poisoned_pool(of, **options)
    tokens, entered = generate(of, pool)
    assert entered == 43
    assert pool.save_prefixes(path) == NUM_FULL
    other = poisoned_pool(of, num_blocks=77, **options)
    assert other.load_prefixes(path) == NUM_FULL
    assert other.num_cached == pool.num_cached
    assert generate(of, other) == (tokens, 43 - 40)
    if "kv_dtype" not in options:
        assert tokens == expected(of)
    assert_whole(other)


def test_another_process_goes_on(tmp_path):
    """After a restart, with the model from a folder, a prompt costs its last tokens; `generate` and the batcher see it."""
    of = model("llama")
    of.save_pretrained(tmp_path / "model")
    saved(of, tmp_path / "prefixes.safetensors")
    program = """
        import json, sys, torch, paged_cache
        from transformers import AutoModelForCausalLM
        from paged_cache import BlockPool, ContinuousBatcher, PagedCache
        model = AutoModelForCausalLM.from_pretrained("model")
        ids = torch.tensor([json.loads(sys.argv[1])])
        pool = BlockPool.for_model(model, num_blocks=100, block_size=4)
        loaded = pool.load_prefixes("prefixes.safetensors")
        found = PagedCache.for_prompt(pool, ids).get_seq_length()
        with paged_cache.patch(model):
            out = model.generate(ids, past_key_values=PagedCache(pool), max_new_tokens=5, eos_token_id=None, do_sample=False)
        hits = pool.stats().prefix_hits
        with ContinuousBatcher(model, pool) as batcher:
            served = batcher.generate(ids.tolist(), max_new_tokens=5, eos_token_id=None, do_sample=False, progress_bar=False)[0]
        pool.check()
        print(json.dumps([loaded, found, out[0, 43:].tolist(), hits, served.generated_tokens, served.cached_tokens]))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(program), encoding="utf-8")
    status, output, errors = run_script(script, tmp_path, json.dumps(PROMPT[0].tolist()), timeout=200)

    assert status == 0, errors
    (tokens,) = expected(of)
    assert json.loads(output.splitlines()[-1]) == [NUM_FULL, 40, tokens, 40 + 40, tokens, 40]


def test_the_same_prefixes_make_the_same_file(path):
    """Bytes do not depend on which blocks held what, nor on the order in which prompts came."""
    of = model("llama")
    saved(of, path, PROMPT, OTHER)
    first = path.read_bytes()
    saved(of, path, OTHER, PROMPT, num_blocks=99)
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_loading_twice_loads_once(llama_file):
    """What the pool holds already is not loaded again, whether it came from the file or was computed."""
    of = model("llama")
    pool = poisoned_pool(of)
    generate(of, pool, OTHER)
    computed = pool.num_cached
    assert pool.load_prefixes(llama_file) == NUM_FULL
    assert pool.load_prefixes(llama_file) == 0
    assert pool.num_cached == computed + NUM_FULL // 4
    pool.check()
    for ids, rest in ((PROMPT, 3), (OTHER, 30 - 28)):
        assert generate(of, pool, ids) == (expected(of, ids), rest)
    assert_whole(pool)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_pool_that_is_nearly_full(kind, path, caplog):
    """Only as much is loaded as there are blocks that nobody references, the shortest prefixes first; this is said."""
    of = model(kind)
    groups = len(saved(of, path, PROMPT, OTHER).storage.layout.windows)
    pool = poisoned_pool(of, num_blocks=20 * groups)
    held = PagedCache(pool)
    with paged_cache.patch(of), torch.no_grad():
        of(OTHER + 5, past_key_values=held)
    tables, free = held.block_tables, pool.num_free // groups
    assert 0 < free < 19
    with caplog.at_level(logging.WARNING, "paged_cache"):
        assert pool.load_prefixes(path) == free * 4
    assert f"{free * 4} tokens loaded" in caplog.text
    assert held.block_tables == tables
    assert pool.num_free - pool.num_free % groups == free * groups
    found = [PagedCache.for_prompt(pool, ids).get_seq_length() for ids in (PROMPT, OTHER)]
    assert sum(found) == free * 4
    assert max(found) - min(found) <= 4
    pool.check()
    del held
    for ids in (PROMPT, OTHER):
        tokens, entered = generate(of, pool, ids)
        assert tokens == expected(of, ids)
        assert entered < ids.shape[1]
    assert_whole(pool)


def test_a_pool_without_room(llama_file):
    """Into a pool whose blocks are all in use nothing is loaded."""
    of = model("llama")
    pool = poisoned_pool(of, num_blocks=8)
    cache = PagedCache(pool)
    with paged_cache.patch(of), torch.no_grad():
        of(OTHER[:, :29] + 3, past_key_values=cache)
    assert pool.num_free == 0
    assert pool.load_prefixes(llama_file) == 0
    pool.check()


def test_idle_prefixes_give_way_but_not_those_in_the_file(llama_file):
    """Loading evicts cached blocks of other prefixes; those that the file continues stay."""
    of = model("llama")
    pool = poisoned_pool(of, num_blocks=20)
    generate(of, pool, PROMPT[:, :21])
    generate(of, pool, OTHER + 5)
    cached = pool.num_cached
    assert cached >= 13
    loaded = pool.load_prefixes(llama_file)
    assert loaded > 0
    pool.check()
    assert pool.num_cached == 20
    assert pool.stats().evictions > 0
    assert generate(of, pool) == (expected(of), 3)
    assert_whole(pool)


def test_salts(path, caplog):
    """Each salt comes back as what it was; one that a file cannot name is left out, with a warning that names it."""
    of = model("llama")
    pool = poisoned_pool(of)
    salts = [None, 1, True, "1", b"\x01", ("a", (1, None)), ""]
    for salt in (*salts, 1.5):
        generate(of, pool, cache_salt=salt)
    with caplog.at_level(logging.WARNING, "paged_cache"):
        assert pool.save_prefixes(path) == len(salts) * NUM_FULL
    assert "[1.5]" in caplog.text
    other = poisoned_pool(of)
    assert other.load_prefixes(path) == len(salts) * NUM_FULL
    for salt in salts:
        assert generate(of, other, cache_salt=salt) == (expected(of), 3)
    for salt in (1.5, 1.0, ("a", (True, None)), b""):
        assert generate(of, other, cache_salt=salt)[1] == 43
    assert_whole(other)


def test_nothing_to_save(path):
    """A pool that shares nothing, or holds nothing yet, makes a file without prefixes, which can be loaded."""
    for kind in ("llama", "qwen3_next"):
        of = model(kind)
        pool = poisoned_pool(of)
        if kind == "qwen3_next":
            generate(of, pool)
        assert pool.save_prefixes(path) == 0
        assert pool.load_prefixes(path) == 0


@functools.cache  # a pool does not keep its model alive
def changed(change):
    """A copy of the llama, changed."""
    of = copy.deepcopy(model("llama"))
    change(of)
    return of


def one_bit(of):
    """The last bit of the last element of one weight."""
    of.model.layers[1].mlp.down_proj.weight.data.view(torch.int32)[-1, -1] ^= 1


def rope(of):
    """Another base of the rotary positions, in the config alone."""
    of.config.rope_parameters = of.config.rope_parameters | {"rope_theta": 5000.0}


OTHERS = {
    "weights": (lambda: poisoned_pool(changed(one_bit), 50), "fingerprint"),
    "config": (lambda: poisoned_pool(changed(rope), 50), "5000.0"),
    "type": (lambda: poisoned_pool(model("mistral"), 50), "MistralForCausalLM"),
    "dtype": (lambda: poisoned_pool(model("llama"), 50, dtype=torch.float64), "float64"),
    "kv_dtype": (lambda: poisoned_pool(model("llama"), 50, kv_dtype="int8"), "int8"),
    "block size": (lambda: poisoned_pool(model("llama"), 50, 8), "block_size 4, here it is 8"),
    "no prefixes": (lambda: poisoned_pool(model("llama"), 50, prefix_caching=False), "prefix_caching=True"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_files_of_others_are_refused(other, llama_file):
    """Another model, by type, config or one bit of its weights, or another pool: the message has both values."""
    make, part = OTHERS[other]
    assert_refused(make(), llama_file, part)


def test_a_layer_of_another_shape_is_refused(llama_file):
    """A pool whose layer has given another shape in a forward is not laid out again for a file."""
    pool = poisoned_pool(model("llama"), 50)
    pool.confirm(1, LayerSpec(None, 2, 16, 2, 16))
    assert_refused(pool, llama_file, "layer 1", "key_dim=8", "key_dim=16")


def test_a_config_that_lies_is_corrected(path):
    """A pool that knows the shapes from the config alone takes those of the file, as it would take a forward's."""
    of = model("llama")
    saved(of, path)
    pool = poisoned_pool(of)
    layout = pool.storage.layout
    pool.storage.relayout(layout.with_spec(1, dataclasses.replace(layout.specs[1], key_dim=16)))
    assert pool.load_prefixes(path) == NUM_FULL
    assert generate(of, pool) == (expected(of), 3)
    assert_whole(pool)


def test_states_that_cannot_be_told_are_refused(llama_file, path):
    """In training mode, without a model, and after it is gone nothing is saved or loaded."""
    of = copy.deepcopy(model("llama"))
    pool = BlockPool.for_model(of, num_blocks=50, block_size=4)
    of.train()
    assert_refused(pool, llama_file, "model.eval()")
    with pytest.raises(InvalidRequestError, match="eval"):
        pool.save_prefixes(path)
    del of
    gc.collect()
    with pytest.raises(InvalidRequestError, match="gone"):
        pool.load_prefixes(llama_file)
    assert not path.exists()


def test_why_a_state_cannot_be_told(llama_file, monkeypatch):
    """The message has the one reason that applies: a module in training mode, weights of inference mode, mixed adapters."""
    of = lora(model("llama"), "sql")
    pool = poisoned_pool(of)
    layer = next(x for x in of.modules() if isinstance(x, peft.tuners.lora.LoraLayer))
    mixing = functools.partial(lambda *args, **kwargs: None, adapter_names=["sql"])
    hook = layer.register_forward_pre_hook(mixing)
    assert_refused(pool, llama_file, "a batch of mixed adapters runs now")
    hook.remove()
    layer.lora_A["sql"].train()
    assert_refused(pool, llama_file, "layers.0.self_attn.q_proj.lora_A.sql is in training mode", "model.eval()")
    of.train()
    assert_refused(pool, llama_file, "the model is in training mode")
    with torch.inference_mode():
        made = copy.deepcopy(model("llama"))
    assert made.lm_head.weight.is_inference()
    assert_refused(poisoned_pool(made), llama_file, "made in inference mode", "outside of torch.inference_mode()")


def test_paths_that_are_wrong(llama_file, tmp_path):
    """No file, a folder, a missing folder, a file of another kind: named, before anything is done."""
    pool = poisoned_pool(model("llama"), 50)
    assert_refused(pool, tmp_path / "none", "there is no file", "none")
    assert_refused(pool, tmp_path, f"{tmp_path} is a folder")
    (tmp_path / "text").write_text("{}")
    assert_refused(pool, tmp_path / "text", "no safetensors file")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    assert_refused(pool, tmp_path / "foreign", "not one that pool.save_prefixes wrote")
    for target, part in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "no folder")):
        with pytest.raises(InvalidRequestError, match=part):
            pool.save_prefixes(target)


@pytest.fixture
def unprivileged():
    """An empty folder, seen as a user whom permissions concern."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if is_root:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
            Path(folder).chmod(0o700)


def test_permissions(unprivileged):
    """What may not be read or written is named as it was given, with the reason, and nothing is left beside it."""
    pool = poisoned_pool(model("llama"), 50)
    path = unprivileged / "file"
    pool.save_prefixes(path)
    whole = path.read_bytes()
    path.chmod(0o400)
    with pytest.raises(InvalidRequestError, match=f"{path} cannot be written: Permission denied for {path}"):
        pool.save_prefixes(path)
    path.chmod(0)
    assert_refused(pool, path, f"{path} cannot be read: Permission denied")
    path.chmod(0o600)
    unprivileged.chmod(0o500)
    for target in (path, unprivileged / "new"):
        with pytest.raises(InvalidRequestError, match=f"{target} cannot be written: Permission denied for its folder"):
            pool.save_prefixes(target)
    assert [(entry, entry.read_bytes()) for entry in unprivileged.iterdir()] == [(path, whole)]
    unprivileged.chmod(0)
    assert_refused(pool, path, f"{path} cannot be read: Permission denied")
    with pytest.raises(InvalidRequestError, match=f"{path} cannot be written: Permission denied"):
        pool.save_prefixes(path)


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("_sync", OSError(28, "No space left on device", "/other")),
        ("save_file", SafetensorError("I/O error: No space left on device")),
    ],
    ids=["errno", "safetensors"],
)
def test_a_failure_names_the_path(failing, error, path, monkeypatch):
    """Whatever fails while a file is written: an OSError with the path that was asked for and the reason."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(prefix_file, failing, fail)
    with pytest.raises(OSError, match="No space left") as failure:
        poisoned_pool(model("llama"), 50).save_prefixes(path)
    assert str(path) in str(failure.value)
    assert "/other" not in str(failure.value)
    assert failure.value.errno == getattr(error, "errno", None)
    assert not list(path.parent.iterdir())


def test_a_link_is_written_through(path):
    """A symbolic link stays one, and what it points to gets the file, whether it was there or not."""
    pool = poisoned_pool(model("llama"), 50)
    (path.parent / "there").mkdir()
    target = path.parent / "there" / "target"
    path.symlink_to(Path("there") / "target")
    for _ in range(2):
        pool.save_prefixes(path)
        assert path.is_symlink()
        assert not target.is_symlink()
        assert pool.load_prefixes(path) == 0
    assert list(target.parent.iterdir()) == [target]
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(InvalidRequestError, match="Too many levels of symbolic links"):
        pool.save_prefixes(path)


def test_what_is_no_file_stays(path, monkeypatch):
    """FIFOs and devices are neither replaced nor opened, which could wait for ever, and this is said before any work."""
    pool = poisoned_pool(model("llama"), 50)
    os.mkfifo(path)
    monkeypatch.setattr(type(pool), "_states", None)
    for target in (path, Path("/dev/null")):
        with pytest.raises(InvalidRequestError, match=f"{target} is no regular file"):
            pool.save_prefixes(target)
        with pytest.raises(InvalidRequestError, match=f"{target} is a device, a FIFO or a socket"):
            pool.load_prefixes(target)
    assert path.is_fifo()


def test_modes(path):
    """A new file has the mode that `open` would give it, one that was there keeps its own."""
    pool = poisoned_pool(model("llama"), 50)
    before = os.umask(0o027)
    try:
        pool.save_prefixes(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    pool.save_prefixes(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def rewritten(source, target, change):
    """The file again, after `change(header, tensors)`; its checksum is not corrected."""
    with safe_open(source, framework="pt") as opened:
        header = json.loads(opened.metadata()["paged_cache"])
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, target, metadata={"paged_cache": json.dumps(header)})


DAMAGES = {
    "format": (lambda header, tensors: header.update(format=2), "format 2, this version reads 1"),
    "no format": (lambda header, tensors: header.pop("format"), "damaged"),
    "no description": (lambda header, tensors: header.pop("description"), "checksum"),
    "version": (lambda header, tensors: header["description"].update(transformers="4.0"), "checksum"),
    "a tensor less": (lambda header, tensors: tensors.pop("layers.1.values"), "checksum"),
    "a tensor more": (lambda header, tensors: tensors.update(x=torch.zeros(1)), "checksum"),
    "shape": (lambda header, tensors: tensors.update({"nodes.tokens": tensors["nodes.tokens"].view(-1)}), "checksum"),
    "token": (lambda header, tensors: tensors["nodes.tokens"].view(-1)[5].add_(1), "checksum"),
    "sign": (lambda header, tensors: tensors["layers.0.keys"].neg_(), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_changed_files_are_refused(damage, llama_file, path):
    """A file that is whole as safetensors, but was changed, is refused."""
    change, part = DAMAGES[damage]
    rewritten(llama_file, path, change)
    assert_refused(poisoned_pool(model("llama"), 50), path, part)


def with_branch(file, number, **fields):
    """The file with another branch in one place."""
    branches = list(file.branches)
    branches[number] = dataclasses.replace(branches[number], **fields)
    return dataclasses.replace(file, branches=branches)


def described(file, **fields):
    """The file with another description."""
    return dataclasses.replace(file, description=dataclasses.replace(file.description, **fields))


FORGERIES = {
    "child before parent": (lambda file: with_branch(file, 2, parent=5), "node 2"),
    "its own parent": (lambda file: with_branch(file, 2, parent=2), "node 2"),
    "parent below": (lambda file: with_branch(file, 2, parent=-2), "node 2"),
    "no such root": (lambda file: with_branch(file, 1, root=9), "node 1"),
    "twice": (lambda file: with_branch(file, 1, tokens=file.branches[0].tokens), "twice"),
    "token beyond": (lambda file: with_branch(file, 3, tokens=(1, 2, 3, 128)), "the model knows 0 to 127"),
    "token below": (lambda file: with_branch(file, 3, tokens=(-1, 2, 3, 4)), "from -1"),
    "transformers": (lambda file: described(file, transformers="4.0"), "transformers '4.0', here it is"),
    "weights": (lambda file: described(file, weights="0"), "fingerprint is '0', here it is"),
    "config": (lambda file: described(file, config=file.description.config | {"new": 1}), "config.new 1, here it is None"),
    "config of no kind": (lambda file: described(file, config=None), "damaged"),
    "a root of two names": (
        lambda file: described(
            file, roots=[*file.description.roots, dataclasses.replace(file.description.roots[0], adapters=("x",))]
        ),
        "twice",
    ),
    "two equal roots": (lambda file: described(file, roots=file.description.roots * 2), "twice"),
    "layers": (lambda file: described(file, layers={0: file.description.layers[0]}), "belong to no layer"),
    "heads": (
        lambda file: described(
            file, layers={i: dataclasses.replace(x, key_heads=10**9) for i, x in file.description.layers.items()}
        ),
        "tensors of layer 0",
    ),
    "size": (lambda file: dataclasses.replace(file, layers={**file.layers, 1: {}}), "tensors of layer 1"),
    "holds": (lambda file: dataclasses.replace(file, holds=[[False]] * len(file.holds)), "tensors of layer 0"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_files_are_refused(forgery, llama_file, path):
    """A file with a right checksum that means something impossible, or something else, does not reach the index."""
    change, part = FORGERIES[forgery]
    prefix_file.write(path, change(prefix_file.read(llama_file)))
    assert_refused(poisoned_pool(model("llama"), 50), path, part)


def test_damaged_bytes_never_load(llama_file, path):
    """Flipped bits, truncations, doubled and zeroed pieces anywhere: an InvalidRequestError, and nothing else."""
    whole, pool = llama_file.read_bytes(), poisoned_pool(model("llama"), 50)
    randomly = random.Random(5)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for i in range(300):
        data, place = bytearray(whole), randomly.randrange(header if i % 2 else len(whole))
        if i % 4 < 2:
            data[place] ^= 1 << randomly.randrange(8)
        elif i % 4 == 2:
            del data[place:]
        else:
            end = randomly.randrange(place, len(whole))
            data[place:end] = whole[:end] if i % 8 == 3 else bytes(end - place)
        if bytes(data) == whole:
            continue
        path.write_bytes(data)
        try:
            pool.load_prefixes(path)
        except InvalidRequestError:
            refused += 1
        else:  # what does not matter, such as a space in the header: then all of it is right
            assert generate(model("llama"), pool) == (expected(model("llama")), 3)
            pool.clear_prefix_cache()
        assert pool.num_cached == 0
    pool.check()
    assert refused >= 295


def test_a_write_that_fails_leaves_the_old_file(llama_file, path, monkeypatch):
    """A full disk in the middle: the file of before is there, and nothing beside it."""
    pool = saved(model("llama"), path)
    before = path.read_bytes()
    generate(model("llama"), pool, OTHER)

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(prefix_file, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        pool.save_prefixes(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    pool.check()


def interrupt(*args):
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def test_a_load_that_fails_changes_nothing(llama_file, monkeypatch):
    """If copying into the blocks fails, the blocks are free again and nothing of the file is found; nor after Ctrl-C."""
    of = model("llama")
    pool = poisoned_pool(of)
    generate(of, pool, OTHER)
    known = pool.num_cached
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(saved_prefixes, "write_blocks", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pool.load_prefixes(llama_file)
    assert len(calls) == 2
    pool.check()
    assert pool.num_cached == known
    with monkeypatch.context() as patch:
        patch.setattr(type(pool.manager.index), "put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.load_prefixes(llama_file)
    pool.check()
    assert pool.load_prefixes(llama_file) >= NUM_FULL
    assert generate(of, pool) == (expected(of), 3)
    assert_whole(pool)


def test_weights_that_change_meanwhile(llama_file, path, monkeypatch):
    """Weights that change between their fingerprint and the copy are noticed, saving and loading."""
    of = copy.deepcopy(model("llama"))
    pool = poisoned_pool(of)
    generate(of, pool)

    def then_change(model):
        digest = saved_prefixes.model_config(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(saved_prefixes, "weights_digest", then_change)
        with pytest.raises(InvalidRequestError, match="changed meanwhile"):
            pool.save_prefixes(path)
    assert not path.exists()


@pytest.mark.parametrize("names", [None, ["sql", "chat", "__base__", "sql"]])
def test_saving_while_others_generate(names, path):
    """A pool in use by another thread, with one adapter or several, is saved again and again: all files are whole and right."""
    of = model("llama") if names is None else lora(model("llama"), "sql", "chat")
    stop, failures, reader = threading.Event(), [], copy.deepcopy(of)
    pool = poisoned_pool(of, num_blocks=40)
    randomly = random.Random(3)
    starts = [[randomly.randrange(10, 80) for _ in range(20)] for _ in range(4)]

    def work(batcher):
        try:
            while not stop.is_set():
                prompts = [[*start, *(randomly.randrange(10, 80) for _ in range(6))] for start in starts]
                batcher.generate(prompts, max_new_tokens=4, do_sample=False, progress_bar=False, adapter_names=names)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    num_hits = 0
    with ContinuousBatcher(of, pool) as batcher:
        thread = threading.Thread(target=work, args=(batcher,))
        thread.start()
        try:
            for _ in range(8):
                saved_tokens = pool.save_prefixes(path)
                other = poisoned_pool(reader, num_blocks=60)
                assert other.load_prefixes(path) == saved_tokens <= 40 * 4
                for start, name in zip(starts, names or starts, strict=True):
                    ids = torch.tensor([[*start, 11]])
                    if names is not None:
                        reader.base_model.set_adapter([] if name == "__base__" else name)
                    tokens, entered = generate(reader, other, ids)
                    assert tokens == expected(reader, ids)
                    num_hits += entered < 21
                other.check()
        finally:
            stop.set()
            thread.join(timeout=60)
    assert not thread.is_alive()
    assert not failures
    assert num_hits > 0
    assert_whole(pool)


def lora(of, *names, seed=0, **options):
    """The model with random LoRA adapters of these names."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )
    wrapped = peft.get_peft_model(copy.deepcopy(of), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped.eval()


def test_adapters_keep_their_prefixes(path):
    """The base model and each adapter find their own again; a base model without peft finds the base model's."""
    of = lora(model("llama"), "sql", "chat")
    pool = poisoned_pool(of)
    tokens = {}
    for name in ("sql", "chat"):
        of.set_adapter(name)
        tokens[name], _ = generate(of, pool)
    with of.disable_adapter():
        tokens["__base__"], _ = generate(of, pool)
    assert len(set(map(str, tokens.values()))) == 3
    assert pool.save_prefixes(path) == 3 * NUM_FULL

    again = lora(model("llama"), "sql", "chat")
    other = poisoned_pool(again)
    assert other.load_prefixes(path) == 3 * NUM_FULL
    for name in ("sql", "chat"):
        again.set_adapter(name)
        assert generate(again, other) == (tokens[name], 3)
    with again.disable_adapter():
        assert generate(again, other) == (tokens["__base__"], 3)
    assert_whole(other)

    plain = poisoned_pool(model("llama"))
    assert_refused(plain, path, "no adapter in the model has the weights of", "(loaded are [])")
    assert plain.load_prefixes(path, adapter_name="__base__") == NUM_FULL
    assert generate(model("llama"), plain) == (expected(model("llama")), 3)
    assert_refused(plain, path, "adapter_name is 'sql'; loaded are []", adapter_name="sql")


def test_one_adapter_alone(path):
    """`adapter_name` picks the prefixes of one adapter, saving and loading."""
    of = lora(model("llama"), "sql", "chat")
    pool = poisoned_pool(of)
    for name in ("sql", "chat"):
        of.set_adapter(name)
        generate(of, pool)
    assert pool.save_prefixes(path, adapter_name="sql") == NUM_FULL
    assert pool.save_prefixes(path, adapter_name="__base__") == 0
    assert pool.save_prefixes(path) == 2 * NUM_FULL
    other = poisoned_pool(of)
    assert other.load_prefixes(path, adapter_name="chat") == NUM_FULL
    assert generate(of, other)[1] == 3
    of.set_adapter("sql")
    assert generate(of, other)[1] == 43
    with pytest.raises(InvalidRequestError, match=r"adapter_name is 'law'; loaded are \['chat', 'sql'\]"):
        pool.save_prefixes(path, adapter_name="law")


OTHER_ADAPTERS = {
    "weights": lambda: lora(model("llama"), "sql", seed=1),
    "one element": lambda: one_element(lora(model("llama"), "sql")),
    "scaling": lambda: rescaled(lora(model("llama"), "sql")),
    "kind": lambda: lora(model("llama"), "sql", use_dora=True),
}


def one_element(of):
    """The adapter with one element changed through `.data`."""
    next(x for name, x in of.named_parameters() if "lora_B" in name).data[0, 0] += 1e-3
    return of


def rescaled(of):
    """The adapter, stronger."""
    for layer in of.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scaling["sql"] *= 2
    return of


@pytest.mark.parametrize("other", OTHER_ADAPTERS)
def test_an_adapter_of_the_same_name_is_refused(other, path):
    """The same name with other weights, another scaling, or of another kind is another adapter."""
    saved(lora(model("llama"), "sql"), path)
    of = OTHER_ADAPTERS[other]()
    assert_refused(poisoned_pool(of), path, "adapter 'sql' has other weights")
    assert_refused(poisoned_pool(of), path, "adapter 'sql' has other weights", adapter_name="sql")


def test_adapters_are_known_by_their_content(path):
    """An adapter finds its prefixes under any name, also where its old name is that of another one."""
    of = lora(model("llama"), "sql")
    tokens, _ = generate(of, saved(of, path))
    renamed = lora(model("llama"), "pagedcache_000012", "sql")
    for options in ({}, {"adapter_name": "pagedcache_000012"}, {"adapter_name": "sql"}):
        pool = poisoned_pool(renamed)
        if options == {"adapter_name": "sql"}:
            assert_refused(pool, path, "adapter 'sql' has other weights", **options)
            continue
        assert pool.load_prefixes(path, **options) == NUM_FULL
        renamed.set_adapter("sql")
        assert generate(renamed, pool)[1] == 43
        renamed.set_adapter("pagedcache_000012")
        assert generate(renamed, pool) == (tokens, 3)
        assert_whole(pool)
    foreign = lora(model("llama"), "chat", seed=1)
    assert_refused(poisoned_pool(foreign), path, "no adapter in the model has the weights of 'sql'", "['chat']")


def test_one_content_is_saved_once(path):
    """What two names of one adapter computed is in the file once, under the same checksum whatever the names are."""
    of = twins("a", "b")
    pool = poisoned_pool(of)
    for name in ("a", "b"):
        of.set_adapter(name)
        generate(of, pool)
    assert pool.save_prefixes(path) == NUM_FULL
    (root,) = prefix_file.read(path).description.roots
    assert root.adapters == ("a",)
    other = twins("z", "b")
    pool = poisoned_pool(other)
    assert pool.load_prefixes(path) == NUM_FULL
    for name in ("z", "b"):
        other.set_adapter(name)
        assert generate(other, pool)[1] == 3
    assert_whole(pool)


def twins(*names):
    """The model with one adapter under two names."""
    of = lora(model("llama"), *names)
    state = of.state_dict()
    of.load_state_dict({key: state[key.replace(f".{names[1]}.", f".{names[0]}.")] for key in state})
    return of


def test_adapters_together(path):
    """Two adapters that are active at once are a state of their own, which has to be active to be loaded."""
    of = lora(model("llama"), "sql", "chat")
    of.base_model.set_adapter(["sql", "chat"])
    tokens = saved(of, path)
    tokens, _ = generate(of, tokens)
    other = lora(model("llama"), "sql", "chat")
    pool = poisoned_pool(other)
    assert_refused(pool, path, "together", "set_adapter(['sql', 'chat'])")
    other.base_model.set_adapter(["sql", "chat"])
    assert pool.load_prefixes(path) == NUM_FULL
    assert generate(other, pool) == (tokens, 3)
    renamed = lora(model("llama"), "chat", "law")
    pool = poisoned_pool(renamed)
    assert_refused(pool, path, "no adapters in the model have the weights of ['sql', 'chat']")
    renamed.base_model.set_adapter(["chat", "law"])
    assert pool.load_prefixes(path) == NUM_FULL
    assert generate(renamed, pool) == (tokens, 3)
    changed = lora(model("llama"), "sql", "chat", seed=1)
    changed.base_model.set_adapter(["sql", "chat"])
    assert_refused(poisoned_pool(changed), path, "['sql', 'chat'], which are active together, have other weights")


def test_merged_adapters_are_other_weights(path):
    """What a merged model computed is for this merged model: neither the base model nor the adapter takes it."""
    of = lora(model("llama"), "sql")
    of.merge_adapter()
    tokens, _ = generate(of, saved(of, path))
    assert_refused(poisoned_pool(model("llama")), path, "fingerprint")
    apart = lora(model("llama"), "sql")
    assert_refused(poisoned_pool(apart), path, "fingerprint")
    again = lora(model("llama"), "sql")
    again.merge_adapter()
    pool = poisoned_pool(again)
    assert pool.load_prefixes(path) == NUM_FULL
    assert generate(again, pool) == (tokens, 3)
    saved(apart, path)
    assert_refused(poisoned_pool(again), path, "['sql'] merged")
    unloaded = again.merge_and_unload()
    assert unloaded.config.model_type == "llama"


def test_the_batcher_takes_a_file(llama_file):
    """Requests of a batcher begin with loaded prefixes."""
    of = model("llama")
    pool = poisoned_pool(of)
    pool.load_prefixes(llama_file)
    with ContinuousBatcher(of, pool) as batcher:
        outputs = batcher.generate(
            [PROMPT[0].tolist(), OTHER[0].tolist()],
            max_new_tokens=5, eos_token_id=None, do_sample=False, progress_bar=False,
        )  # fmt: skip
    assert [output.cached_tokens for output in outputs] == [40, 28]
    assert [[output.generated_tokens] for output in outputs] == [expected(of), expected(of, OTHER)]
    assert_whole(pool)


class AlwaysCopy:
    """Costs by which host memory is always worth a copy."""

    def __getattr__(self, name):
        return lambda *args: True


@pytest.mark.parametrize(
    ("kind", "num_blocks", "options"),
    [
        ("llama", 14, {}),
        ("gemma2", 26, {}),
        ("gemma2", 26, {"kv_dtype": "int8"}),
        ("deepseek_v3", 14, {"kv_dtype": "fp8_e4m3"}),
    ],
    ids=str,
)
def test_what_went_to_host_memory_is_saved(kind, num_blocks, options, path):
    """Prefixes whose blocks were evicted to host memory are in the file, beside those in the pool, and make the same file."""
    of = model(kind)
    saved(of, path, PROMPT, OTHER, **options)
    whole = path.read_bytes()
    pool = poisoned_pool(of, num_blocks=num_blocks, offload_memory="1MB", **options)
    pool.manager.host.costs = AlwaysCopy()
    for ids in (PROMPT, OTHER):
        generate(of, pool, ids)
    assert pool.stats().num_offloaded > 4
    path.unlink()
    pool.save_prefixes(path)
    assert path.read_bytes() == whole
    pool.check()
    if not options:
        assert generate(of, pool)[0] == expected(of)


@pytest.mark.gpu
def test_a_file_of_the_cpu_loads_on_cuda(llama_file, path):
    """Fingerprints and layout do not depend on the device, in either direction."""
    of = copy.deepcopy(model("llama")).cuda()
    pool = BlockPool.for_model(of, num_blocks=100, block_size=4)
    assert pool.load_prefixes(llama_file) > 0
    assert generate(of, pool, PROMPT.cuda())[1] == 3
    pool.save_prefixes(path)
    other = poisoned_pool(model("llama"))
    assert other.load_prefixes(path) > 0
    assert generate(model("llama"), other) == (expected(model("llama")), 3)
