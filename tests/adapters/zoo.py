"""Models with adapters of all kinds, and what a prompt gives under one of them alone."""

import contextlib
import copy
import dataclasses
import functools

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.architectures.tiny import randomise
from tests.batching.alone import PAD, alone, prompt, tiny

BASE = "__base__"
GAIN = 0.7
NOTED = "adapter_layer_names"  # to which peft adds the name of DoRA's magnitudes, once, where there was an adapter with them
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def lora(target_modules=("q_proj", "v_proj"), **options):
    """A LoRA configuration, rank 4 if nothing else is said."""
    target_modules = (
        target_modules if isinstance(target_modules, str) or target_modules is None else list(target_modules)
    )
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": target_modules} | options)


@dataclasses.dataclass(frozen=True)
class Zoo:
    """A model and its adapters: those whose rows run in one forward, and those that need one of their own."""

    model: str = "llama"
    grouped: dict[str, peft.PeftConfig] = dataclasses.field(default_factory=dict)
    exact: dict[str, peft.PeftConfig] = dataclasses.field(default_factory=dict)


def tuner(config_class, **options):
    """Two adapters of a method that is no LoRA, on two sets of modules."""
    few, many = (config_class(target_modules=list(names), **options) for names in (ATTENTION[:2], ATTENTION))
    return Zoo(exact={"few": few, "many": many})


PLAIN = {
    "attention": lora(ATTENTION),
    "strong": lora(r=8, lora_alpha=64),
    "rslora": lora(ATTENTION, r=16, use_rslora=True),
    "ffn": lora(MLP, r=2),
    "all": lora("all-linear", r=3),
    "patterns": lora(ATTENTION + MLP, rank_pattern={"q_proj": 9, "layers.1.mlp.*": 1}, alpha_pattern={"v_proj": 32}),
    "one_layer": lora(ATTENTION, layers_to_transform=[1]),
}
AROUND = {
    "embeddings": lora(["embed_tokens", "q_proj"]),
    "head": lora(["lm_head", "v_proj"], r=6),
    "biased": lora(ATTENTION, lora_bias=True),
    "both": lora(["embed_tokens", "lm_head"], r=2),
}
SPECIAL = {
    "dora": lora(ATTENTION, use_dora=True),
    "saved_head": lora(modules_to_save=["lm_head"]),
    "saved_embeddings": lora(modules_to_save=["embed_tokens"]),
}
TOKENS = {
    "some": lora(ATTENTION, trainable_token_indices=list(range(10, 50))),
    "others": lora(MLP, trainable_token_indices={"embed_tokens": list(range(30, 70))}),
}
GPT2 = {
    "attention": lora(["c_attn"], fan_in_fan_out=True),
    "everything": lora(["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, r=8),
    "embeddings": lora(["wte", "c_fc"], r=2),
}
EXPERTS = {"attention": lora(ATTENTION), "small": lora(["v_proj"], r=2, lora_alpha=16)}

ZOOS = {
    "llama": Zoo(grouped=PLAIN),
    "llama, embeddings and head": Zoo(grouped=AROUND),
    "llama, special": Zoo(grouped={"plain": lora(ATTENTION), "all": lora("all-linear", r=2)}, exact=SPECIAL),
    "llama, tokens": Zoo(grouped={"plain": lora(ATTENTION)}, exact=TOKENS),
    "tied": Zoo("tied", grouped={"attention": lora(ATTENTION), "all": lora("all-linear")}),
    "tied, tokens": Zoo("tied", exact=TOKENS),
    "gpt2": Zoo("gpt2", grouped=GPT2),
    "mistral": Zoo("mistral", grouped={"attention": lora(ATTENTION), "ffn": lora(MLP, r=2)}),
    "qwen2": Zoo("qwen2", grouped={"attention": lora(ATTENTION, r=7), "all": lora("all-linear", r=2)}),
    "gemma2": Zoo("gemma2", grouped={"attention": lora(ATTENTION), "ffn": lora(MLP)}),
    "mixtral": Zoo("mixtral", grouped=EXPERTS),
    "qwen3_moe": Zoo("qwen3_moe", grouped=EXPERTS),
    "mixtral, experts": Zoo(
        "mixtral",
        grouped={"attention": lora(ATTENTION)},
        exact={
            name: lora(["q_proj"], target_parameters=["experts.down_proj"], r=r) for name, r in (("e", 4), ("f", 2))
        },
    ),
    "bloom": Zoo("bloom", exact={"attention": lora(["query_key_value"]), "ffn": lora(["dense_h_to_4h"], r=2)}),
    "qwen3_next": Zoo("qwen3_next", exact={"attention": lora(["q_proj", "o_proj"]), "all": lora("all-linear")}),
    "ia3": Zoo(
        exact={
            "few": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
            "many": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        }
    ),
    "loha": tuner(peft.LoHaConfig, r=4),
    "lokr": tuner(peft.LoKrConfig, r=4),
    "vera": Zoo(exact={name: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]) for name in ("few", "many")}),
    "oft": tuner(peft.OFTConfig, oft_block_size=4, r=0),
    "boft": tuner(peft.BOFTConfig, boft_block_size=4),
    "hra": tuner(peft.HRAConfig, r=4),
    "adalora": Zoo(
        exact={
            f"r{r}": peft.AdaLoraConfig(init_r=r, target_modules=ATTENTION, total_step=9, inference_mode=True)
            for r in (4, 6)
        }
    ),
    "trainable tokens": Zoo(
        exact={
            "low": peft.TrainableTokensConfig(token_indices=[*range(10, 50)]),
            "high": peft.TrainableTokensConfig(token_indices=[*range(40, 80)]),
        }
    ),
}


@functools.cache
def _tied():
    """A Llama whose head is its embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    of = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()
    randomise(of)
    of.generation_config.pad_token_id = PAD
    return of


def make(zoo, seed=0):
    """The model with all adapters, strong random ones; none of it is shared with other tests."""
    of = copy.deepcopy(_tied() if zoo.model == "tied" else tiny(zoo.model))
    (first, config), *others = (zoo.grouped | zoo.exact).items()
    wrapped = peft.get_peft_model(of, copy.deepcopy(config), adapter_name=first)
    for name, config in others:
        wrapped.add_adapter(name, copy.deepcopy(config))
    strengthen(wrapped, seed)
    return wrapped.eval()


@torch.no_grad()
def strengthen(of, seed=0, only=None):
    """Adds noise to all that belongs to adapters, or to one of them: those of peft begin without effect."""
    generator = torch.Generator().manual_seed(seed)
    names = set(of.peft_config) if only is None else {only}
    for path, parameter in of.named_parameters():
        if names & set(path.split(".")) and "ranknum" not in path:  # a count, which is not saved
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=GAIN / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else GAIN / 2)


@contextlib.contextmanager
def under(of, name):
    """One adapter is active, or none; afterwards those that were."""
    before = of.active_adapters if hasattr(of, "base_model") else of.active_adapters()
    if name == BASE:
        with of.disable_adapter():
            yield
        return
    of.set_adapter(name)
    try:
        yield
    finally:
        of.base_model.set_adapter(before)


def expected(of, ids, name, **options):
    """What `generate` gives for a prompt alone when this adapter is the active one."""
    if name is None:
        return alone(of, ids, **options)
    with under(of, name):
        return alone(of, ids, **options)


def mixed(names, length=9):
    """For each adapter and for none: the same prompt twice, and one of its own."""
    shared = prompt(length)
    rows = [(shared, name) for name in [*names, BASE]]
    return rows + [(prompt(5 + 3 * i, seed=i), name) for i, name in enumerate([BASE, *names])]


def state_of(of):
    """All that serving must leave as it was."""
    modules = dict(of.named_modules())
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module).keys() - {NOTED}) for name, module in modules.items()},
        "forwards": {name: getattr(vars(module).get("forward"), "__func__", None) for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, hook, ())) for hook in hooks] for name, module in modules.items()},
        "active": {
            name: module.active_adapters for name, module in modules.items() if hasattr(module, "merged_adapters")
        },
        "disabled": {name: vars(module).get("_disable_adapters") for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: x.requires_grad for name, x in of.named_parameters()},
        "weights": {name: x.clone() for name, x in of.state_dict().items()},
    }


def assert_same_state(before, after):
    """Everything is as it was, weights to the bit."""
    for kind, value in before.items():
        if kind != "weights":
            assert after[kind] == value, kind
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(x, after["weights"][name]) for name, x in before["weights"].items())
