"""What the tiny models are given to read: prompts, and the few other inputs that some of them cannot do without."""

import torch

from tests.architectures.sizes import BOS, PAD, VOCAB_SIZE

PROMPT_LENGTHS = (5, 12, 20)
FIRST_WORD = 10
NUM_CODEBOOKS = 4
IMAGE_SIDE = 16


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


def prompts(model):
    """The prompts as this model takes them: a decoder after an encoder gets some of its own."""
    inputs = left_padded_prompts()
    if not model.config.is_encoder_decoder:
        return inputs
    if model.main_input_name != "input_ids":
        inputs = {}
    decoder_prompt = words(len(PROMPT_LENGTHS), min(PROMPT_LENGTHS))
    decoder_prompt[:, 0] = BOS
    return inputs | {"decoder_input_ids": decoder_prompt}


def codebooks():
    """One row of prompt per codebook."""
    input_ids = left_padded_prompts()["input_ids"].repeat_interleave(NUM_CODEBOOKS, 0)
    return {"input_ids": input_ids, "pad_token_id": VOCAB_SIZE}


def pixels():
    """One random image per prompt."""
    return {"pixel_values": torch.randn(len(PROMPT_LENGTHS), 3, IMAGE_SIDE, IMAGE_SIDE)}


def images_in_sequence():
    """One random image per prompt, visible to all of its tokens."""
    return {
        "pixel_values": pixels()["pixel_values"][:, None],
        "image_attention_mask": torch.ones(len(PROMPT_LENGTHS), max(PROMPT_LENGTHS), 1, dtype=torch.long),
    }


def flattened_patches():
    """Four random patches per prompt, each after its row and column."""
    patches = torch.randn(len(PROMPT_LENGTHS), 4, 2 + 3 * 8 * 8)
    patches[..., :2] = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])
    return {"flattened_patches": patches}


def boxes():
    """A random place on the page for every token."""
    return {"bbox": torch.rand(len(PROMPT_LENGTHS), max(PROMPT_LENGTHS), 4)}


EXTRA_INPUTS = {
    "itt:idefics": images_in_sequence,
    "musicgen": codebooks,
    "musicgen_melody": codebooks,
    "itt:pix2struct": flattened_patches,
    "itt:pp_formulanet": pixels,
    "itt:udop": boxes,
    "itt:vision-encoder-decoder": pixels,
}
