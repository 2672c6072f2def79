"""How a paged pipeline is made, what it takes and refuses, and that nothing else changes by it."""

import gc
import weakref

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, TextGenerationPipeline, pipeline
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pipelines import PIPELINE_REGISTRY

from paged_cache import BlockPool, InvalidRequestError, UnsupportedModelError, is_patched
from paged_cache.assets import MODEL_PATH
from paged_cache.integrations import PagedTextGenerationPipeline, paged_pipeline
from paged_cache.integrations.pipeline_settings import make_pool
from tests.integrations.pipes import CHATS, GREEDY, TEMPLATE, TEXTS, make_pipe, one_by_one, shipped_model
from tests.models import assert_whole, poisoned_pool

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def pipe():
    """The unwrapped pipeline."""
    return make_pipe()


@pytest.fixture(scope="module")
def expected(pipe):
    """The outputs for `TEXTS`."""
    return one_by_one(pipe, TEXTS, **GREEDY)


def test_transformers_makes_one_from_a_folder(expected):
    """`pipeline(..., pipeline_class=...)` loads model and tokenizer, and takes our settings beside its own."""
    with pipeline(
        "text-generation",
        model=str(MODEL_PATH),
        pipeline_class=PagedTextGenerationPipeline,
        device="cpu",
        policy="fcfs",
        memory="2MiB",
        max_num_seqs=2,
        read_ahead=3,
        batch_size=8,
        **GREEDY,
    ) as paged:
        assert paged(TEXTS) == expected
        stats = paged.batcher.stats()
        assert (stats.policy, stats.finished["length"]) == (
            "fcfs",
            sum(stats.finished.values()) - stats.finished.get("stop", 0),
        )
        assert paged.pool.nbytes <= 2 * 2**20


def test_the_pipeline_and_transformers_stay_as_they_are(expected):
    """Registries, classes, tokenizer and pipeline are the same while a paged one is open and after it."""
    pipe = make_pipe()
    class_before, registry = dict(vars(TextGenerationPipeline)), dict(PIPELINE_REGISTRY.supported_tasks)
    warm = paged_pipeline(make_pipe(), memory="2MiB")  # our attention is registered once, whoever is first
    warm.close()
    tables = [dict(ALL_ATTENTION_FUNCTIONS._global_mapping), dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)]
    state, padding_side = dict(vars(pipe)), pipe.tokenizer.padding_side

    with paged_pipeline(pipe, memory="2MiB") as paged:
        stream = paged((text for text in TEXTS), **GREEDY)
        outputs = [next(stream)]
        assert pipe(TEXTS[1], **GREEDY) == expected[1]
        assert pipe(TEXTS, batch_size=2, **GREEDY)[0] == expected[0]
        outputs += stream
        assert outputs == expected
        assert is_patched(pipe.model)
        assert type(pipe) is TextGenerationPipeline

    assert not is_patched(pipe.model)
    assert {**vars(pipe), "call_count": 0} == {**state, "call_count": 0}
    assert pipe.tokenizer.padding_side == padding_side
    assert dict(vars(TextGenerationPipeline)) == class_before
    assert dict(PIPELINE_REGISTRY.supported_tasks) == registry
    assert [dict(t._global_mapping) for t in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)] == tables
    assert pipe(TEXTS[0], **GREEDY) == expected[0]


def test_a_pool_of_its_own_is_freed(pipe):
    """Closing lets go of a pool that nobody else has; a pool that was given stays."""
    paged = paged_pipeline(pipe, memory="2MiB")
    its_own = weakref.ref(paged.pool)
    paged.close()
    gc.collect()
    assert its_own() is None

    pool = poisoned_pool(pipe.model, num_blocks=100, block_size=16)
    with paged_pipeline(pipe, pool) as paged:
        assert paged.pool is paged.batcher.pool is pool
        paged("for", **GREEDY)
        blocks = paged.batcher.stats().peak_blocks_in_use
    assert blocks > 0
    assert_whole(pool)


def test_a_pipeline_that_is_dropped_unpatches(pipe):
    """Without `close`, garbage collection does it."""
    paged = paged_pipeline(pipe, memory="2MiB")
    paged("for", **GREEDY)
    assert is_patched(pipe.model)
    del paged
    gc.collect()

    assert not is_patched(pipe.model)


def test_the_default_pool_is_sensible(monkeypatch):
    """Room for as many longest contexts as sequences run at once; less where that is over the share of free memory."""
    model = shipped_model()
    context, per_token = model.config.max_position_embeddings, 3072

    assert make_pool(model, None, 4).num_tokens == 4 * context
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=4 * 100 * 16 * per_token))
    assert make_pool(model, None, 4).num_tokens == 100 * 16
    assert make_pool(model, "1MiB", 4).nbytes <= 2**20
    with paged_pipeline(make_pipe()) as paged:
        assert paged.pool.num_tokens == 100 * 16


class Shouting(TextGenerationPipeline):
    """A user's own: takes records, and shouts."""

    def preprocess(self, prompt_text, **kwargs):
        return super().preprocess(prompt_text["text"], **kwargs)

    def postprocess(self, model_outputs, **kwargs):
        records = super().postprocess(model_outputs, **kwargs)
        return [record | {"generated_text": record["generated_text"].upper()} for record in records]


def test_subclasses_keep_what_they_do(expected):
    """`preprocess` and `postprocess` of a class of the user's own are used."""
    pipe = Shouting(model=shipped_model(), tokenizer=make_pipe().tokenizer, task="text-generation", device="cpu")
    with paged_pipeline(pipe, memory="2MiB") as paged:
        outputs = paged([{"text": text} for text in TEXTS], **GREEDY)

    assert isinstance(paged, Shouting)
    assert type(paged).__name__ == "PagedShouting"
    assert outputs == [[{"generated_text": one[0]["generated_text"].upper()}] for one in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_such": 3}, "no_such=3: no setting"),
        ({"max_queue_size": 3}, "max_queue_size cannot be honoured"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many'"),
        ({"policy": "longest"}, "longest"),
        ({"memory": "much"}, "memory is 'much'"),
        ({"pool": "mine"}, "pool='mine'"),
    ],
)
def test_wrong_settings_are_named(pipe, settings, message):
    """A setting that is unknown or wrong is named with its value, and the model stays unpatched."""
    with pytest.raises(InvalidRequestError, match=message):
        paged_pipeline(pipe, **({"memory": "2MiB"} if "pool" not in settings else {}) | settings)

    assert not is_patched(pipe.model)


def test_settings_that_are_listed_are_taken(pipe):
    """The list of known settings names all that can be given, and none that is refused."""
    with pytest.raises(InvalidRequestError) as error:
        paged_pipeline(pipe, no_such=3)
    listed = str(error.value).split("known are ")[1].rstrip(".").split(", ")

    assert {"pool", "policy", "memory", "max_num_seqs", "read_ahead", "return_errors"} <= set(listed)
    assert "max_queue_size" not in listed
    for name in set(listed) - {"policy"}:
        paged_pipeline(pipe, **{"memory": "2MiB"} | {name: None}).close()


def test_pools_of_others_are_refused(pipe):
    """A pool and memory for one contradict each other, and a pool belongs to its model."""
    pool = BlockPool.for_model(pipe.model, num_blocks=8)
    other = AutoModelForCausalLM.from_config(pipe.model.config).eval()

    with pytest.raises(InvalidRequestError, match="pool and memory='1MiB'"):
        paged_pipeline(pipe, pool, memory="1MiB")
    with pytest.raises(InvalidRequestError, match="the pool is none of this LlamaForCausalLM"):
        paged_pipeline(make_pipe(), BlockPool.for_model(other, num_blocks=8))


def test_other_pipelines_are_refused_by_name(pipe):
    """Only text generation is paged, and only once; nothing that assists, and no model that does not generate."""
    features = pipeline("feature-extraction", model=str(MODEL_PATH), device="cpu")
    with pytest.raises(InvalidRequestError, match="FeatureExtractionPipeline of task 'feature-extraction'"):
        paged_pipeline(features)
    with pytest.raises(InvalidRequestError, match="pipe is a str"):
        paged_pipeline("text-generation")
    with (
        paged_pipeline(pipe, memory="2MiB") as paged,
        pytest.raises(InvalidRequestError, match="PagedTextGenerationPipeline"),
    ):
        paged_pipeline(paged)
    with pytest.raises(UnsupportedModelError, match="LlamaModel generates no text"):
        pipeline("feature-extraction", model=str(MODEL_PATH), device="cpu", pipeline_class=PagedTextGenerationPipeline)
    with pytest.raises(InvalidRequestError, match="assistant_model=LlamaForCausalLM cannot be honoured"):
        paged_pipeline(make_pipe(assistant_model=shipped_model()))


def test_models_in_training_mode_are_refused():
    """Dropout would make every answer different."""
    pipe = make_pipe()
    pipe.model = AutoModelForCausalLM.from_config(pipe.model.config).train()
    with pytest.raises(InvalidRequestError, match="training mode"):
        paged_pipeline(pipe, memory="2MiB")


IMAGE = {"type": "image", "url": "cat.png"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (CHATS[0], "the input is a chat and .* has no chat_template"),
        ([TEXTS[0], CHATS[0]], "the input is a chat and .* has no chat_template"),
        ([*TEXTS, 5], "the input is int: 5"),
        ({"text": "for", "images": []}, "the input is dict: .*KeyDataset"),
        ([TEXTS[0], torch.zeros(3)], "the input is Tensor"),
        ([["for", "while"]], "the input is list"),
        (b"for", "the input is bytes: b'for'"),
        (bytearray(b"for"), "the input is bytearray"),
        (torch.tensor([[1, 2]]), r"the input is Tensor: tensor\(\[\[1, 2\]\]\)"),
        (np.arange(3), "the input is ndarray: "),
    ],
)
def test_inputs_that_cannot_be_read_are_named(pipe, inputs, message):
    """Chats without a template, records and numbers are refused before anything is computed."""
    with paged_pipeline(pipe, memory="2MiB") as paged:
        with pytest.raises(InvalidRequestError, match=message):
            paged(inputs, **GREEDY)
        assert paged.batcher.stats().num_steps == 0
        assert not paged.batcher.stats().finished


def test_images_are_refused_by_name():
    """A part of a message that is no text is named; parts that are text are read."""
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "text", "text": "def add("}]}]
    pipe = make_pipe(template)
    with paged_pipeline(pipe, memory="2MiB") as paged:
        assert paged(chat, **GREEDY) == pipe(chat, **GREEDY)
        with pytest.raises(InvalidRequestError, match="message 0 has content of type 'image'"):
            paged([chat, [{"role": "user", "content": [IMAGE]}]], **GREEDY)
        stream = paged((item for item in [chat, [{"role": "user", "content": [IMAGE]}]]), **GREEDY)
        assert next(stream) == pipe(chat, **GREEDY)
        with pytest.raises(InvalidRequestError, match="message 0 has content of type 'image'"):
            next(stream)


def test_adapters_of_the_moment(pipe):
    """`adapter_names` goes to the batcher as it is: names that the model does not have are refused there."""
    with paged_pipeline(pipe, memory="2MiB") as paged:
        with pytest.raises(InvalidRequestError, match="sql"):
            paged(TEXTS, adapter_names="sql", **GREEDY)
        with pytest.raises(InvalidRequestError, match="adapter_names has 1 entries for 5 inputs"):
            paged(TEXTS, adapter_names=["sql"], **GREEDY)
        assert paged.batcher.stats().num_steps == 0


def test_sklearn_style_calls_work(pipe, expected):
    """`predict` and `transform` are calls, as in transformers."""
    with paged_pipeline(make_pipe(TEMPLATE, **GREEDY), memory="2MiB") as paged:
        assert paged.predict(TEXTS) == paged.transform(TEXTS) == expected
