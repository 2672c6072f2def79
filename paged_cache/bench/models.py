"""Models that are served: random ones from a seed, and the one that the package ships."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ..assets import MODEL_PATH

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
    """A model without an end-of-sequence token: whoever serves it generates as many tokens as were asked for."""
    torch.manual_seed(seed)
    if name == SHIPPED:
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=dtype)
    else:
        model = _random_model(SIZES[name], device, dtype)
    model = model.to(device)
    model.set_attn_implementation("sdpa")
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = None, 0
    return model.eval()


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
    config = model.config
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize)
