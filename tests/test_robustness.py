"""What happens at the edges: interrupts, copies of models, threads, gradients, autocast, and changes in mid-sequence."""

import copy
import gc
import threading

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_utils import AttentionInterface

import paged_cache
from paged_cache import BlockPool, InvalidRequestError, OutOfBlocksError, PagedCache
from tests.architectures.tiny import build
from tests.models import assert_whole, maybe_patched, model, poisoned_pool, prompts
from tests.test_prefix_reuse import expected, generate, lora, with_system

GREEDY = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
both_ways = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


def test_same_call_after_an_interrupt():
    """Ctrl-C in the middle of a turn, then the same call on the same cache: the tokens are right."""
    of, dynamic = copy.deepcopy(model("llama")), DynamicCache(config=model("llama").config)
    cache = PagedCache(poisoned_pool(of))
    with paged_cache.patch(of):
        for past in (cache, dynamic):
            turn = of.generate(prompts((9,))["input_ids"], **GREEDY, past_key_values=past)
        again = torch.cat([turn, prompts((5,), seed=4)["input_ids"]], 1)
        hook = of.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            of.generate(again, **GREEDY, past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == turn.shape[1] - 1
        paged = of.generate(again, **GREEDY, past_key_values=cache)
    assert torch.equal(paged, of.generate(again, **GREEDY, past_key_values=dynamic))


def test_copy_of_a_patched_model():
    """A deep copy is patched on its own: it works while and after the original is unpatched, and can be unpatched."""
    of = copy.deepcopy(model("llama"))
    tokens = of.generate(**prompts(), **GREEDY)
    before = of.config._attn_implementation
    paged_cache.patch(of)
    twin = copy.deepcopy(of)
    paged_cache.unpatch(of)
    pool = poisoned_pool(twin)
    assert paged_cache.is_patched(twin)
    assert torch.equal(twin.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool)), tokens)
    assert pool.num_cached
    paged_cache.unpatch(twin)
    assert not paged_cache.is_patched(twin)
    assert twin.config._attn_implementation == before
    assert "forward" not in vars(twin)
    assert not twin._forward_pre_hooks
    assert "paged_cache" not in AttentionInterface._global_mapping
    assert torch.equal(twin.generate(**prompts(), **GREEDY), tokens)


def test_patched_model_is_collected():
    """A patched model that nobody holds leaves nothing registered."""
    of = copy.deepcopy(model("llama"))
    paged_cache.patch(of)
    del of
    gc.collect()
    assert "paged_cache" not in AttentionInterface._global_mapping


def test_users_choice_after_patch_stays():
    """An attention that the user sets on a patched model survives `unpatch`."""
    of = copy.deepcopy(model("llama"))
    paged_cache.patch(of)
    of.set_attn_implementation("eager")
    paged_cache.unpatch(of)
    assert of.config._attn_implementation == "eager"


def test_threads_share_a_pool():
    """Many threads, each with its own caches, on one patched model and a tight pool: right tokens or out of blocks."""
    of = copy.deepcopy(model("llama"))
    inputs = [prompts((n, n + 7), seed=n) for n in (9, 17, 25)]
    tokens = [of.generate(**x, **GREEDY) for x in inputs]
    pool = BlockPool.for_model(of, num_blocks=45, block_size=4)
    failures, done = [], []

    def work(which):
        try:
            for _ in range(40):
                try:
                    result = of.generate(**inputs[which], **GREEDY, past_key_values=PagedCache(pool))
                except OutOfBlocksError:
                    continue
                done.append(which)
                assert torch.equal(result, tokens[which])
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failures.append(repr(error)[:500])

    with paged_cache.patch(of):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    assert len(done) > 10
    assert_whole(pool)


@both_ways
def test_gradients_of_new_tokens(patched):
    """The tokens of a forward get the gradients that they get with a DynamicCache; earlier ones are constants in both."""
    of, ids = copy.deepcopy(model("llama")), prompts((20,))["input_ids"]
    norms = []
    for cache in (DynamicCache(config=of.config), PagedCache(poisoned_pool(of))):
        of.zero_grad()
        with maybe_patched(of, patched):
            with torch.no_grad():
                of(ids[:, :12], past_key_values=cache)
            of(ids[:, 12:], past_key_values=cache).logits.square().mean().backward()
        norms.append([p.grad.norm() for p in of.parameters()])
    torch.testing.assert_close(norms[1], norms[0], atol=1e-5, rtol=1e-3)


@both_ways
def test_autocast(patched):
    """Under autocast, where keys and values differ in dtype, an fp32 pool gives what a DynamicCache gives."""
    of = copy.deepcopy(model("llama"))
    with torch.autocast("cpu", torch.bfloat16), maybe_patched(of, patched):
        tokens = of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(poisoned_pool(of)))
        reference = of.generate(**prompts(), **GREEDY, past_key_values=DynamicCache(config=of.config))
    assert torch.equal(tokens, reference)


def test_pool_made_in_inference_mode():
    """It also serves `generate` outside."""
    of = copy.deepcopy(model("llama"))
    with torch.inference_mode():
        pool = BlockPool.for_model(of, num_blocks=100)
    of.generate(**prompts(), **GREEDY, past_key_values=PagedCache(pool))
    assert_whole(pool)


def test_failed_expansion_leaves_the_rows():
    """Too few blocks for eight returned sequences: the cache keeps its one row and goes on."""
    of = copy.deepcopy(model("llama"))
    pool = poisoned_pool(of, num_blocks=12)
    cache, ids = PagedCache(pool), prompts((30,))["input_ids"]
    with paged_cache.patch(of):
        first = of.generate(ids, **GREEDY, past_key_values=cache)
        longer = torch.cat([first, ids[:, :5]], 1)
        with pytest.raises(OutOfBlocksError):
            of.generate(longer, **GREEDY | {"do_sample": True}, num_return_sequences=8, past_key_values=cache)
        assert len(cache.block_tables) == 1
        tokens = of.generate(longer, **GREEDY | {"max_new_tokens": 1}, past_key_values=cache)
    assert torch.equal(tokens, of.generate(longer, **GREEDY | {"max_new_tokens": 1}))


def test_a_shorter_prompt_for_a_used_cache():
    """`generate` takes it for the beginning of what the cache holds: refused, and the cache goes on."""
    of, first = copy.deepcopy(model("llama")), prompts((12,))["input_ids"]
    cache = PagedCache(poisoned_pool(of))
    with paged_cache.patch(of):
        tokens = of.generate(first, **GREEDY, past_key_values=cache)
        for shorter in (first[:, :7], first[:, 2:3]):
            with pytest.raises(InvalidRequestError, match=r"no new tokens, the cache holds \d+: .* cache\.reset\(\)"):
                of.generate(shorter, **GREEDY, past_key_values=cache)
        longer = of.generate(tokens, **GREEDY, past_key_values=cache)
        with pytest.raises(InvalidRequestError, match="the prompt is empty"):
            of(torch.empty(1, 0, dtype=torch.long), past_key_values=PagedCache(cache.pool))
    assert torch.equal(longer, of.generate(tokens, **GREEDY))


def test_mask_that_uncovers_padding():
    """Padding is not stored, so that a later mask cannot show it."""
    of, inputs = copy.deepcopy(model("llama")), prompts((4, 9))
    cache = PagedCache(poisoned_pool(of))
    with paged_cache.patch(of), torch.no_grad():
        of(**inputs, past_key_values=cache)
        with pytest.raises(InvalidRequestError, match="row 0"):
            of(torch.tensor([[5], [6]]), attention_mask=torch.ones(2, 10), past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_adapter_changes_within_a_block():
    """A block of which some tokens were computed with another adapter never enters the index."""
    of = lora(copy.deepcopy(model("llama")), "a", "b")
    pool = poisoned_pool(of, block_size=16)
    ids = with_system([])["input_ids"][:, :36]
    with paged_cache.patch(of), torch.no_grad():
        cache = PagedCache(pool)
        of(ids[:, :20], past_key_values=cache)
        for i in range(20, 34):
            if 22 <= i < 28:
                with of.disable_adapter():
                    of(ids[:, i : i + 1], past_key_values=cache)
            else:
                of(ids[:, i : i + 1], past_key_values=cache)
        assert PagedCache.for_prompt(pool, ids).get_seq_length() == 16


def replaced_module(of):
    """Another activation function."""
    of.model.layers[0].mlp.act_fn = torch.nn.ReLU()


def training_inside(of):
    """Dropout in the decoder while the outer model says eval."""
    of.model.train()


@pytest.mark.parametrize("change", [replaced_module, training_inside], ids=lambda change: change.__name__)
def test_modules_count_as_weights(change):
    """A replaced module, or one in training mode, is noticed: nothing computed before is reused."""
    of, inputs = copy.deepcopy(model("llama")), with_system([11, 12])
    pool = poisoned_pool(of)
    with paged_cache.patch(of):
        generate(of, pool, inputs)
        change(of)
        tokens, entered = generate(of, pool, inputs)
        assert entered == 42 + 4
        assert torch.equal(tokens, expected(of, inputs))


def test_slips_get_clear_errors():
    """The pool in place of the cache, a list of ids, a mask that does not fit, an unhashable salt, an odd dtype."""
    of = model("llama")
    pool = poisoned_pool(of)
    slips = {
        "PagedCache": lambda: of.generate(**prompts(), **GREEDY, past_key_values=pool),
        "input_ids is list": lambda: PagedCache.for_prompt(pool, [[1, 2]]),
        "does not fit": lambda: PagedCache.for_prompt(pool, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4)),
        "hashable": lambda: PagedCache(pool, cache_salt=["a"]),
        "float32": lambda: BlockPool.for_model(of, num_blocks=2, dtype="float32"),
        "int64": lambda: BlockPool.for_model(of, num_blocks=2, dtype=torch.int64),
    }
    for words, slip in slips.items():
        with pytest.raises(InvalidRequestError, match=words):
            slip()


@both_ways
@pytest.mark.parametrize("name", ["s2s:t5", "s2s:bart"])
def test_encoder_decoders_need_a_second_cache(name, patched):
    """A PagedCache alone is refused, the error says what to pass, and the cache works in it after that."""
    of, _ = build(name)
    pool = poisoned_pool(of)
    inputs = {"input_ids": torch.randint(10, 80, (2, 40), generator=torch.Generator().manual_seed(3))}
    want = of.generate(**inputs, **GREEDY)
    with maybe_patched(of, patched):
        cache = PagedCache(pool)
        with pytest.raises(InvalidRequestError, match=r"EncoderDecoderCache\(PagedCache\(pool\), DynamicCache\(\)\)"):
            of.generate(**inputs, **GREEDY, past_key_values=cache)
        assert pool.num_free == pool.num_blocks
        pair = EncoderDecoderCache(cache, DynamicCache())
        assert torch.equal(of.generate(**inputs, **GREEDY, past_key_values=pair), want)
