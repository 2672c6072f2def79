"""A plan is what `BlockPool.for_model` makes of the model, and its requests hold the blocks that they hold there."""

import pytest
import torch
import transformers

from paged_cache import BlockPool, ContinuousBatcher, PagedCache
from paged_cache.compat import text_config
from paged_cache.errors import OutOfBlocksError
from paged_cache.planning import plan
from paged_cache.planning.weights import meta_model
from tests.architectures.tiny import ARCHITECTURES, build, config_class_of, tiny_config
from tests.models import KINDS, model

NAMES = [
    "llama", "gpt2", "mistral", "qwen2", "gemma2", "gemma3_text", "gemma3", "deepseek_v3", "deepseek_v32", "gpt_oss",
    "qwen3_next", "falcon", "gemma3n_text", "gemma4_text", "llama4_text", "jamba", "falcon_h1", "bloom", "opt", "mimo_v2_flash",
    "s2s:t5", "gpt_neox", "trocr", "modernbert-decoder", "lfm2",
]  # fmt: skip
MEMORY = 3_000_001


def tiny(name):
    """The tiny config of an architecture."""
    return tiny_config(config_class_of(name, getattr(transformers, ARCHITECTURES[name])))


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_the_pool(name, kv_dtype):
    """Bytes of a token, groups, bytes of a block, blocks and tokens of a plan are those of the pool."""
    config = tiny(name)
    made = plan(config, memory=MEMORY, with_weights=False, overhead=0, kv_dtype=kv_dtype, block_size=8)
    small = plan(config, memory=MEMORY, weights_memory=1_000_000, overhead=0.1, kv_dtype=kv_dtype, block_size=8)

    for each in (made, small):
        pool = BlockPool.for_model(on_cpu(config), memory=each.pool_memory, kv_dtype=kv_dtype, block_size=8)
        assert each.bytes_per_token == pool.bytes_per_token == sum(kind.bytes_per_token for kind in each.kinds)
        assert each.windows == pool.storage.layout.windows
        assert (each.num_blocks, each.num_tokens) == (pool.num_blocks, pool.num_tokens)
        assert each.num_blocks * each.block_nbytes == pool.nbytes
    assert small.num_blocks < made.num_blocks


def on_cpu(config):
    """The model with memory, but for its values."""
    return meta_model(config, torch.float32).to_empty(device="cpu")


def test_the_line_of_code_makes_the_pool():
    """The line that a plan shows can be run as it is."""
    made = plan(model("llama").config, memory="1MiB", with_weights=False, kv_dtype="int8", block_size=4)
    pool = eval(made.code, {"BlockPool": BlockPool, "model": model("llama")})

    assert (pool.num_blocks, pool.block_size, pool.kv_dtype) == (made.num_blocks, 4, torch.int8)
    assert pool.nbytes == made.num_blocks * made.block_nbytes


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("prompt", "output"), [(5, 1), (9, 8), (30, 11)])
def test_a_request_holds_the_blocks_that_are_planned(kind, prompt, output):
    """After `generate` a cache holds as many blocks as planned; with windows at most as many, and that peak is reached."""
    of = model(kind)
    made = plan(of.config, memory="1MiB", with_weights=False, block_size=4, prompt_len=prompt, output_len=output)
    pool = BlockPool.for_model(of, num_blocks=100, block_size=4)
    of.generate(
        input_ids=torch.full((1, prompt), 7), attention_mask=torch.ones(1, prompt, dtype=torch.long), do_sample=False,
        past_key_values=(cache := PagedCache(pool)), max_new_tokens=output, min_new_tokens=output,
    )  # fmt: skip
    held = pool.stats().num_referenced
    states = made.states.nbytes + made.states.bytes_per_token * (prompt + output - 1)
    planned_blocks, rest = divmod(int(made.paged.bytes_per_request) - states, made.block_nbytes)

    assert rest == 0
    assert held <= planned_blocks if any(made.windows) else held == planned_blocks
    assert held >= planned_blocks - len(made.windows)
    assert cache.get_seq_length() == prompt + output - 1


def test_beams_hold_no_more_than_planned():
    """Beams of one prompt share its full blocks; what else they hold is bounded by the plan."""
    of, beams, prompt, output = model("llama"), 4, 21, 12
    made = plan(
        of.config, memory="1MiB", with_weights=False, block_size=4, prompt_len=prompt, output_len=output, num_beams=beams
    )  # fmt: skip
    pool = BlockPool.for_model(of, num_blocks=200, block_size=4)
    of.generate(
        input_ids=torch.full((1, prompt), 7), attention_mask=torch.ones(1, prompt, dtype=torch.long), num_beams=beams,
        do_sample=False, past_key_values=(cache := PagedCache(pool)), max_new_tokens=output, min_new_tokens=output,
    )  # fmt: skip

    assert made.paged.bytes_per_request == (5 + beams * (8 - 5)) * made.block_nbytes
    assert 5 < pool.stats().num_referenced <= 5 + beams * 3
    assert cache.get_seq_length() == prompt + output - 1


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "falcon_h1", "deepseek_v32"])
def test_states_are_those_of_a_real_cache(name):
    """Bytes besides K and V, told on the meta device, are those that a real forward leaves."""
    of = build(name)[0]
    made = plan(of.config, memory="1GiB", dtype="float32")
    cache = transformers.DynamicCache(config=text_config(of.config))
    with torch.no_grad():
        of(input_ids=torch.full((1, 9), 7), past_key_values=cache, use_cache=True)
    held = [value for layer in cache.layers for name, value in vars(layer).items() if name not in ("keys", "values")]
    held += [each for value in held if isinstance(value, dict) for each in value.values()]
    real = sum(value.numel() * value.itemsize for value in held if isinstance(value, torch.Tensor) and value.ndim)

    assert real == made.states.nbytes + 9 * made.states.bytes_per_token > 0


def test_other_shapes_than_the_config_tells_are_noted():
    """MiMo's layers with a window have other heads than its config's common names say: the plan says so."""
    made = plan(tiny("mimo_v2_flash"), memory="1GiB")

    assert any("other shapes than the config tells" in note for note in made.notes)
    assert not any("other shapes" in note for note in plan(tiny("llama"), memory="1GiB").notes)


LONG, NEW = 400, 8


@pytest.fixture(scope="module")
def sliding():
    """A model with a short window in every layer, and what a small memory holds of requests with long prompts."""
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=97, max_position_embeddings=512, sliding_window=32, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    made = plan(
        config, memory="384KiB", with_weights=False, overhead=0, dtype="float32", prompt_len=LONG, output_len=NEW
    )
    return transformers.MistralForCausalLM(config).eval(), made


def test_generate_serves_what_is_planned_for_one_pass(sliding):
    """One `generate` reads the prompts whole: as many rows as planned for one pass fit, and not one more."""
    of, made = sliding

    def answer(count):
        ids = torch.arange(count * LONG).view(count, LONG) % 90 + count
        pool = BlockPool.for_model(of, num_blocks=made.num_blocks)
        return of.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, past_key_values=PagedCache(pool)
        )  # fmt: skip

    fits = made.one_pass.num_requests
    assert 1 < fits < made.paged.num_requests / 3
    assert answer(fits).shape == (fits, LONG + NEW)
    with pytest.raises(OutOfBlocksError):
        answer(fits + 1)


def test_the_batcher_serves_what_is_planned_in_chunks(sliding):
    """`ContinuousBatcher` has as many of these requests under way as are planned in blocks, and puts none of them back."""
    of, made = sliding
    count = made.paged.num_requests
    prompts = [[(7 * i + j) % 90 for j in range(LONG)] for i in range(count)]
    with ContinuousBatcher(of, BlockPool.for_model(of, num_blocks=made.num_blocks)) as batcher:
        outputs = batcher.generate(prompts, max_new_tokens=NEW, do_sample=False, progress_bar=False)

        assert [len(output.generated_tokens) for output in outputs] == [NEW] * count
        assert batcher.stats().num_preemptions == 0


def test_without_windows_one_pass_is_no_different():
    """Layers that keep everything hold most at the end, so that both counts are one."""
    made = plan(model("llama").config, memory="1MiB", with_weights=False)

    assert made.one_pass.num_requests == made.paged.num_requests > 0
    assert made.one_pass.bytes_per_request == made.paged.bytes_per_request
