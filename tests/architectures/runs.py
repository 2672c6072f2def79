"""How the sweep generates: prompts, checks and caches."""

import inspect

import torch
from transformers import DynamicCache, EncoderDecoderCache

from tests.architectures.sizes import PAD, VOCAB_SIZE

PROMPT_LENGTHS = (5, 12, 20)
NEW_TOKENS = 24
SECOND_TURN = 4
FIRST_WORD = 10
CHECKS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "two_turns": {},
}


def words(*shape):
    """Random token ids clear of the special ones."""
    return torch.randint(FIRST_WORD, VOCAB_SIZE - FIRST_WORD, shape)


def left_padded_prompts():
    """Three prompts of different length and their attention mask."""
    torch.manual_seed(1)
    input_ids = torch.full((len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), PAD)
    for row, length in enumerate(PROMPT_LENGTHS):
        input_ids[row, -length:] = words(length)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def cache_argument(model):
    """Name of the argument under which generate and forward take the cache."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def dynamic_cache(model):
    """The cache that transformers itself would use."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not model.config.is_encoder_decoder:
        return cache
    return EncoderDecoderCache(cache, DynamicCache(config=model.config.get_text_config(decoder=True)))


def generate(model, cache, inputs, **options):
    """Generate with this cache, never stopping early."""
    torch.manual_seed(2)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**inputs, **options, **{cache_argument(model): cache})
