"""Tiny random models for every architecture of the installed transformers."""

import dataclasses
import operator

import torch
import transformers
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.inputs import EXTRA_INPUTS
from tests.architectures.overrides import OVERRIDES, SEEDS, STAND_INS, SUBMODELS, TAKE_DICTS
from tests.architectures.sizes import BOS, PAD, SIZES

WEIGHT_GAIN = 1.5
VECTOR_NOISE = 0.1
MIXED_LAYERS = 4

CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TEXT_SIDE = {
    f"{prefix}:{name}": model
    for prefix, mapping in (
        ("itt", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("s2s", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    )
    for name, model in mapping.items()
    if CAUSAL.get(name) != model
}
ARCHITECTURES = CAUSAL | TEXT_SIDE


def build(name):
    """Return the tiny model of one architecture, in evaluation mode, and the extra arguments its generate needs."""
    model_class = getattr(transformers, ARCHITECTURES[name])
    config = tiny_config(config_class_of(name, model_class))
    for key, value in STAND_INS.get(name, {}).items():
        vars(config)[key] = tiny_config(CONFIG_MAPPING[value["model_type"]], **value)
    torch.manual_seed(SEEDS.get(name, 0))
    model = model_class(config).float().eval()
    model = operator.attrgetter(SUBMODELS[name])(model) if name in SUBMODELS else model
    untie(model)
    randomise(model)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, decoder_start_token_id=BOS)
    torch.manual_seed(SEEDS.get(name, 0))
    return model, EXTRA_INPUTS[name]() if name in EXTRA_INPUTS else {}


def config_class_of(name, model_class):
    """Return the config class to build: a text-only class of a multimodal architecture takes the text config alone."""
    config_class = CONFIG_MAPPING[name.split(":")[-1]]
    if model_class.config_class in config_class.sub_configs.values():
        return model_class.config_class
    return config_class


def tiny_config(config_class, **values):
    """Build a tiny config of this class, sub-configs included; `values` come last."""
    values = OVERRIDES.get(config_class.model_type, {}) | OVERRIDES.get(config_class.__name__, {}) | values
    values.pop("model_type", None)
    fields = {field.name for field in dataclasses.fields(config_class)}
    kwargs = {key: value for key, value in SIZES.items() if key in fields} | values
    kwargs |= {key: tiny_sub_config(config_class, key, values) for key in config_class.sub_configs}
    if config_class.model_type in TAKE_DICTS:
        kwargs |= {key: kwargs[key].to_dict() for key in config_class.sub_configs}
    if "layer_types" in fields and "layer_types" not in values:
        kwargs |= mixed_layers(config_class)
    return config_class(**kwargs)


def tiny_sub_config(config_class, key, values):
    """Build one sub-config; its override is a dict of values, or None to leave it out."""
    override = values.get(key, {})
    if override is None:
        return None
    if "model_type" in override:
        return tiny_config(CONFIG_MAPPING[override["model_type"]], **override)
    sub_class = config_class.sub_configs[key]
    if sub_class is AutoConfig:
        sub_class = type(getattr(config_class(), key))
    return tiny_config(sub_class, **override)


def mixed_layers(config_class):
    """Let every layer type of the full-size default occur; nothing where there is only one."""
    kinds = list(dict.fromkeys(getattr(config_class(), "layer_types", None) or []))
    if len(kinds) < 2:
        return {}
    return {"num_hidden_layers": MIXED_LAYERS, "layer_types": (kinds * MIXED_LAYERS)[:MIXED_LAYERS]}


def untie(model):
    """Give a tied output layer weights of its own: tied random ones repeat their input for ever."""
    output = model.get_output_embeddings()
    if isinstance(output, torch.nn.Linear):
        output.weight = torch.nn.Parameter(output.weight.detach().clone())


@torch.no_grad()
def randomise(model):
    """Draw weights large enough for every token to depend on what attention reads."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, WEIGHT_GAIN / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=VECTOR_NOISE)
