"""Models by name: what the hub is asked, and what is said when there is none."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from paged_cache import InvalidRequestError, loading
from paged_cache.assets import MODEL_PATH


@pytest.fixture
def asked(monkeypatch):
    """Names that the hub was asked for; it is out of reach."""
    names = []

    def unreachable(name, timeout):
        assert timeout == loading.PATIENCE
        names.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(loading, "model_info", unreachable)
    return names


def test_a_hub_out_of_reach_is_asked_once(asked, monkeypatch):
    """Then config, tokenizer and model are looked for on this machine only."""
    where = []

    def look(name, **kwargs):
        where.append(kwargs["local_files_only"])
        return kinds[len(where) - 1].from_pretrained(MODEL_PATH, **kwargs)

    kinds = (AutoConfig, AutoTokenizer, AutoModelForCausalLM)
    monkeypatch.setattr(loading, "_load", lambda kind, name, part, **kwargs: look(name, **kwargs))
    model, tokenizer = loading.load("somebody/something")

    assert asked == ["somebody/something"]
    assert where == [True] * 3
    assert tokenizer.vocab_size == model.config.vocab_size


def test_a_folder_is_nothing_to_ask_for(asked):
    """Whether it is named by a string or a path."""
    for name in (str(MODEL_PATH), MODEL_PATH):
        assert loading.load(name)[0].config.model_type == "llama"
    assert not asked


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "nor such an id within reach"),
        ("./nothing", "there is no folder ./nothing"),
        ("~nobodyknows/nothing", "there is no folder ~nobodyknows/nothing"),
        ("/no/thing", "there is no folder /no/thing"),
    ],
)
def test_what_is_nowhere(name, words, asked):
    """One sentence with the name, whatever the name looks like."""
    with pytest.raises(InvalidRequestError, match=words):
        loading.load(name)
    assert asked == [name] * (name == "nobody/nothing")
