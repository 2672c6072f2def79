"""How the sweep generates: prompts, checks and caches."""

import inspect

import torch
from transformers import DynamicCache, EncoderDecoderCache

NEW_TOKENS = 24
SECOND_TURN = 4
CHECKS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "two_turns": {},
}


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
