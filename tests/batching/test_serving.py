"""Models, pools and settings that a batcher refuses when it is made, and how it says so."""

import copy

import peft
import pytest
import torch

from paged_cache import BlockPool, ContinuousBatcher, InvalidRequestError, UnsupportedModelError, is_patched
from tests.batching.alone import alone, prompt, tiny
from tests.models import poisoned_pool

OF_LAYERS = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
CHANGE_INPUTS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "aLoRA": peft.LoraConfig(**OF_LAYERS, alora_invocation_tokens=[5, 6]),
}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("method", CHANGE_INPUTS)
def test_peft_methods_that_change_the_inputs(method, is_compiled):
    """They are refused by name, instead of the answers of the model without them; nothing stays patched."""
    inner = copy.deepcopy(tiny("llama"))
    of = peft.get_peft_model(inner, CHANGE_INPUTS[method]).eval()
    pool = BlockPool.for_model(of, num_blocks=20)
    with pytest.raises(UnsupportedModelError, match=method):
        ContinuousBatcher(torch.compile(of) if is_compiled else of, pool)
    assert not is_patched(inner)


def test_peft_methods_in_the_layers():
    """They are served."""
    config = peft.LoraConfig(**OF_LAYERS, init_lora_weights=False)
    of = peft.get_peft_model(copy.deepcopy(tiny("llama")), config).eval()
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = alone(of.get_base_model(), prompt(9), **options)
    with ContinuousBatcher(of, BlockPool.for_model(of, num_blocks=20)) as batcher:
        assert batcher.generate([prompt(9)], progress_bar=False, **options)[0].sequences == expected


WRONG = {
    "max_num_seqs=1.5": {"max_num_seqs": 1.5},
    "max_num_seqs=0": {"max_num_seqs": 0},
    "max_num_batched_tokens='many'": {"max_num_batched_tokens": "many"},
    "max_num_batched_tokens=-1": {"max_num_batched_tokens": -1},
    "max_queue_size=2.0": {"max_queue_size": 2.0},
    "max_queue_size=0": {"max_queue_size": 0},
    "tokenizer='gpt2'": {"tokenizer": "gpt2"},
    "pool=None": {"pool": None},
    "pool=600": {"pool": 600},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_make_no_sense(message):
    """By name and value, before anything is done to the model."""
    settings = {"pool": poisoned_pool(tiny("llama"), 20), **WRONG[message]}
    with pytest.raises(InvalidRequestError, match=message):
        ContinuousBatcher(tiny("llama"), **settings)
    assert not is_patched(tiny("llama"))


def test_integers_of_other_libraries():
    """Whole numbers of numpy are whole numbers."""
    numpy = pytest.importorskip("numpy")
    pool = poisoned_pool(tiny("llama"), 20)
    with ContinuousBatcher(tiny("llama"), pool, max_num_seqs=numpy.int64(2), max_queue_size=numpy.int32(1)) as batcher:
        assert batcher.max_queue_size == 1
