"""Models that are served: random ones from a seed, the one that the package ships, and any other by id or folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .. import BlockPool
from ..assets import MODEL_PATH
from ..errors import InvalidRequestError
from ..loading import load

SHIPPED = "shipped"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "28m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 4096}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}
NAMES = [*SIZES, SHIPPED]
MAX_POSITIONS = 16384
EMBEDDING_STD = (
    1.0  # against the layers' 0.02: tokens differ clearly, and so do the logits of the best and the next one
)


def make_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model without an end-of-sequence token: whoever serves it generates as many tokens as were asked for.

    Args:
        name: One of `NAMES`, an id on the hub, or a folder.
        device, dtype: Of the model.
        seed: Of the weights of a random one.

    Raises:
        InvalidRequestError, UnsupportedModelError: As `loading.load`.
    """
    torch.manual_seed(seed)
    if name in SIZES:
        model = _random_model(SIZES[name], device, dtype)
        model.set_attn_implementation("sdpa")
    else:
        model = load(folder(name) or name, device=device, dtype=dtype, needs_tokenizer=False)[0]
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = None, 0
    return model.eval()


def folder(name: str) -> Path | None:
    """Where the model lies; None for a random one, or an id on the hub."""
    if name == SHIPPED:
        return MODEL_PATH
    return Path(name) if name not in SIZES and Path(name).is_dir() else None


def load_tokenizer(name: str) -> Any:
    """That of a model.

    Raises:
        InvalidRequestError: The model is a random one.
    """
    if name in SIZES:
        raise InvalidRequestError(f"the model {name} has random weights and no tokenizer, which texts need.")
    return AutoTokenizer.from_pretrained(folder(name) or name)


def _random_model(sizes: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(**sizes, max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=False)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=EMBEDDING_STD)
    return model


def count_parameters(model: Any) -> int:
    """Of the model."""
    return sum(parameter.numel() for parameter in model.parameters())


def kv_bytes_per_token(model: Any) -> int:
    """K and V of one token in all layers."""
    pool = BlockPool.for_model(model, num_blocks=1)
    return pool.nbytes // pool.block_size
