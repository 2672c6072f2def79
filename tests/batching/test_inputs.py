"""What the batcher refuses, by name and before anything is computed; and what it passes on to `generate`."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, UnsupportedModelError
from paged_cache.batching.preparing import REFUSED, UNSERVED
from tests.architectures.tiny import build
from tests.batching.alone import run_alone, tiny
from tests.batching.faults import GREEDY, PATIENCE, PROMPTS, Streamer, batching, expected, tokens
from tests.models import poisoned_pool

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(scope="module")
def batcher():
    """One for all refusals, which leave it as it was."""
    with batching() as batcher:
        yield batcher
        assert batcher.stats().num_steps == 0
        assert batcher.stats().num_waiting == 0


def refused(batcher, words, **options):
    """`submit` and `generate` both refuse, the latter with the prompt's number."""
    with pytest.raises((InvalidRequestError, ValueError, TypeError), match=words):
        batcher.submit(PROMPTS[0], **{**GREEDY, **options})
    with pytest.raises((InvalidRequestError, ValueError, TypeError), match="prompt 0: "):
        batcher.generate(PROMPTS[:1], **{**GREEDY, **options}, progress_bar=False)


SAYING = {
    "assistant_model": lambda: tiny("llama"),
    "cache_implementation": lambda: "static",
    "custom_generate": lambda: "somebody/something",
    "past_key_values": DynamicCache,
    "prefill_chunk_size": lambda: 4,
    "synced_gpus": lambda: True,
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_arguments(batcher, name):
    """Each is refused by its name."""
    value = SAYING.get(name, lambda: torch.ones(1, 3, dtype=torch.long))()
    refused(batcher, f"{name} cannot be honoured", **{name: value})


@pytest.mark.parametrize("name", ["cache_implementation", "prefill_chunk_size"])
def test_refused_in_a_config(batcher, name):
    """The same in a generation config."""
    config = GenerationConfig(max_new_tokens=3)
    setattr(config, name, SAYING[name]())
    with pytest.raises(InvalidRequestError, match=f"{name} cannot be honoured"):
        batcher.submit(PROMPTS[0], config)


def test_refused_arguments_that_say_nothing(batcher):
    """None and False ask for nothing."""
    for name in REFUSED:
        handle = batcher.submit(PROMPTS[0], **GREEDY, **{name: None})
        handle.cancel()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups|group"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"use_cache": False}, "use_cache"),
        ({"adapter_name": "style"}, "there is no such adapter"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": -1.0}, "timeout=-1"),
        ({"cache_salt": {"a"}}, "cache_salt"),
        ({"tenant": {}}, "tenant"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds"),
        ({"num_beams": 2, "streamer": Streamer()}, "streamer"),
        ({"do_sample": True, "num_return_sequences": 2, "streamer": Streamer()}, "streamer"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"temperature": -1.0, "do_sample": True}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"no_such_option": 3}, "no_such_option"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refused_options(batcher, options, words):
    """What is wrong, or cannot be done side by side with others, is refused by its name."""
    refused(batcher, words, **options)


def test_every_unserved_mode_is_known():
    """The names of ways to decode that are not served exist in `generate`'s config, or did once."""
    assert all(names for names in UNSERVED.values())


def test_lists_of_options(batcher):
    """Nothing is begun if one prompt's option is wrong."""
    with pytest.raises(InvalidRequestError, match="max_new_tokens has 3 entries for 2 prompts"):
        batcher.generate(PROMPTS[:2], max_new_tokens=[1, 2, 3])
    with pytest.raises(ValueError, match="prompt 1: "):
        batcher.generate(PROMPTS[:2], max_new_tokens=[1, 0])


def test_prompts_that_cannot_be_served():
    """A prompt that is none is rejected by its number, and does not keep the others from being served."""
    with batching() as batcher:
        outputs = batcher.generate([PROMPTS[0], [], "text", [10**6], PROMPTS[1]], **GREEDY, progress_bar=False)
        assert [output.finish_reason for output in outputs] == ["length", *["rejected"] * 3, "length"]
        assert tokens([outputs[0], outputs[4]]) == expected(*PROMPTS[:2])
        for i, words in ((1, "empty"), (2, "tokenizer"), (3, "1000000")):
            assert f"prompt {i}: " in str(outputs[i].error)
            assert words in str(outputs[i].error)
            assert outputs[i].sequences == []
            assert outputs[i].text == ""
        with pytest.raises(InvalidRequestError, match="empty"):
            batcher.submit([], **GREEDY)
        with pytest.raises(ValueError, match="tokenizer"):
            outputs[0].text  # noqa: B018 (it raises)


def test_nothing_but_text_without_a_tokenizer():
    """That is the batcher's fault, not the prompts': it is said at once, before anything is begun."""
    with batching() as batcher:
        for prompts in (["one", "two"], [[{"role": "user", "content": "one"}]], ("one",)):
            with pytest.raises(InvalidRequestError, match=r"tokenizer=tokenizer\) can read it"):
                batcher.generate(prompts, **GREEDY, progress_bar=False)
        assert sum(batcher.stats().finished.values()) == 0


def test_models_and_pools_that_cannot_be_served():
    """Only a transformers model that generates from tokens alone, in evaluation mode, with its own pool."""
    of = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="Linear"):
        ContinuousBatcher(torch.nn.Linear(2, 2), poisoned_pool(of))
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        ContinuousBatcher(of.model, poisoned_pool(of))
    with pytest.raises(InvalidRequestError, match="pool"):
        ContinuousBatcher(of, poisoned_pool(tiny("gemma2")))
    training = build("llama")[0].train()
    with pytest.raises(InvalidRequestError, match="eval"):
        ContinuousBatcher(training, BlockPool.for_model(training, num_blocks=10))


def test_generation_config():
    """A config as argument, one per prompt in a list, keywords before it: as in `generate`. The caller's stays as it was."""
    configs = [GenerationConfig(max_new_tokens=3), GenerationConfig(max_new_tokens=5, repetition_penalty=1.7)]
    before = [config.to_dict() for config in configs]
    with batching() as batcher:
        outputs = batcher.generate(PROMPTS[:2], configs, progress_bar=False)
        single = batcher.submit(PROMPTS[1], configs[0], max_new_tokens=4).result(timeout=PATIENCE)
        model_config = tiny("llama").generation_config.to_dict()
    assert [config.to_dict() for config in configs] == before
    assert tiny("llama").generation_config.to_dict() == model_config
    for ids, config, output in zip(PROMPTS, configs, outputs, strict=False):
        assert (
            run_alone(tiny("llama"), ids, generation_config=config)[0, len(ids) :].tolist() == output.generated_tokens
        )
    assert single.generated_tokens == expected(PROMPTS[1], max_new_tokens=4)[0]


def test_default_length():
    """Without a length a request is as long as in `generate`."""
    with batching() as batcher:
        output = batcher.submit(PROMPTS[0]).result(timeout=PATIENCE)
    assert output.finish_reason == "length"
    assert output.generated_tokens == run_alone(tiny("llama"), PROMPTS[0])[0, len(PROMPTS[0]) :].tolist()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "sampled"])
def test_streamer_gets_what_that_of_generate_gets(options):
    """The prompt, each token, the end: the same calls with the same shapes."""
    mine, theirs = Streamer(), Streamer()
    run_alone(tiny("llama"), PROMPTS[0], **{**GREEDY, **options}, streamer=theirs)
    with batching() as batcher:
        batcher.submit(PROMPTS[0], **{**GREEDY, **options}, streamer=mine).result(timeout=PATIENCE)
    assert mine.calls == theirs.calls
    assert len(mine.calls) == 8


def test_global_seed():
    """Without a seed of its own a request takes one from torch's random numbers, so that `manual_seed` decides."""
    found = []
    with batching() as batcher:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs = batcher.generate([PROMPTS[0]] * 2, max_new_tokens=8, do_sample=True, progress_bar=False)
            found.append(tokens(outputs))
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]
