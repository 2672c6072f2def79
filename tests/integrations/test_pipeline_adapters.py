"""A paged pipeline around a `PeftModel`: an adapter for each input, in one batch."""

import copy

import pytest
import torch
from transformers import pipeline

from paged_cache import InvalidRequestError
from paged_cache.integrations import PagedTextGenerationPipeline, paged_pipeline
from tests.integrations.pipes import GREEDY, TEXTS, make_tokenizer, one_by_one, shipped_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.timeout(60)

NAMES = ["sql", "__base__", "chat", "sql", "chat"]


@pytest.fixture(scope="module")
def model():
    """The shipped model with two adapters that say different things; no adapter of its own is active but the first."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(shipped_model()), config, adapter_name="sql")
    model.add_adapter("chat", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            weights.data *= 3
    return model.eval()


@pytest.fixture(scope="module")
def pipe(model):
    """The unwrapped pipeline."""
    return pipeline("text-generation", model=model, tokenizer=make_tokenizer(), device="cpu")


@pytest.fixture(scope="module")
def expected(pipe, model):
    """By adapter: the outputs for all texts under `set_adapter`."""
    outputs = {}
    for name in ("sql", "chat"):
        model.set_adapter(name)
        outputs[name] = one_by_one(pipe, TEXTS, **GREEDY)
    with model.disable_adapter():
        outputs["__base__"] = one_by_one(pipe, TEXTS, **GREEDY)
    model.set_adapter("sql")
    assert len({str(rows) for rows in outputs.values()}) == 3
    return outputs


def test_an_adapter_for_each_input(pipe, expected):
    """A list of names has one for each, whatever is active; one name is for all; none is what is active."""
    want = [expected[name][number] for number, name in enumerate(NAMES)]
    with paged_pipeline(pipe, memory="4MiB") as paged:
        assert paged(TEXTS, adapter_names=NAMES, **GREEDY) == want
        assert list(paged((text for text in TEXTS), adapter_names=NAMES, **GREEDY)) == want
        assert paged(TEXTS, adapter_names="chat", **GREEDY) == expected["chat"]
        assert paged(TEXTS[2], adapter_names="__base__", **GREEDY) == expected["__base__"][2]
        assert paged(TEXTS, **GREEDY) == expected["sql"]


def test_names_that_nobody_knows(pipe):
    """They are refused by name before anything is computed."""
    with paged_pipeline(pipe, memory="4MiB") as paged:
        with pytest.raises(InvalidRequestError, match="poetry"):
            paged(TEXTS, adapter_names=[*NAMES[:4], "poetry"], **GREEDY)
        assert paged.batcher.stats().num_steps == 0


def test_adapters_from_folders(model, expected, tmp_path):
    """The batcher's `lora_modules` and `max_loras` are settings of a pipeline: adapters are loaded when they are asked for."""
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(copy.deepcopy(shipped_model()), tmp_path / "sql", adapter_name="sql").eval()
    with pipeline(
        "text-generation",
        model=fresh,
        tokenizer=make_tokenizer(),
        device="cpu",
        pipeline_class=PagedTextGenerationPipeline,
        memory="4MiB",
        lora_modules={"chat": tmp_path / "chat"},
        max_loras=1,
    ) as paged:
        assert "chat" not in fresh.peft_config
        outputs = paged(TEXTS, adapter_names=NAMES, **GREEDY)

    assert outputs == [expected[name][number] for number, name in enumerate(NAMES)]
