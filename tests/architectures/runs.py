"""How the sweep generates: the checks, the caches, and what of their outcome is compared."""

import inspect

import torch
from transformers import DynamicCache, EncoderDecoderCache

from tests.architectures.exceptions import CHECKS_LEFT_OUT
from tests.architectures.inputs import prompts, words

NEW_TOKENS = 16
SECOND_QUESTION = 4
CHECKS = {
    "greedy": {},
    "second turn": {},
    "beam search": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}
# The penalty keeps random models out of short loops, in which any cache would do; what is left is decided by a hair.
ALWAYS = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "num_return_sequences": 1,
    "eos_token_id": None,
    "repetition_penalty": 10.0,
}


def checks_of(name):
    """The checks that this architecture can pass; a second turn repeats the greedy one as its first."""
    possible = [check for check in CHECKS if name not in CHECKS_LEFT_OUT.get(check, {})]
    return [check for check in possible if check != "greedy" or "second turn" not in possible]


def cache_argument(model):
    """Name of the argument under which generate and forward take the cache."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def dynamic_cache(model):
    """The cache that transformers itself would use, for the decoder's own tokens."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def with_cross_attention(model, cache):
    """The cache as generate takes it: a decoder after an encoder needs a second one for what the encoder said."""
    return EncoderDecoderCache(cache, dynamic_cache(model)) if model.config.is_encoder_decoder else cache


def run(model, extra_inputs, check, cache, between_turns=None):
    """Generate with this cache and return the tokens; after two turns, those of the whole conversation."""
    inputs = prompts(model) | extra_inputs | {cache_argument(model): with_cross_attention(model, cache)}
    output = generate(model, inputs | CHECKS[check])
    if check != "second turn":
        return output
    if between_turns is not None:
        between_turns(cache)
    return generate(model, inputs | next_turn(model, inputs, output))


def generate(model, inputs):
    """Generate from a fixed seed, never stopping early."""
    torch.manual_seed(2)
    return model.generate(**ALWAYS | inputs)


def next_turn(model, inputs, output):
    """The whole conversation so far and a new question."""
    conversation = torch.cat([output, words(len(output), SECOND_QUESTION)], dim=1)
    if model.config.is_encoder_decoder:
        return {"decoder_input_ids": conversation}
    new = conversation.shape[1] - inputs["attention_mask"].shape[1]
    ones = inputs["attention_mask"].new_ones(len(conversation), new)
    return {"input_ids": conversation, "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1)}
