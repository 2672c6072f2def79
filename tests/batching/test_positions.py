"""Requests at and beyond the end of a model's positions."""

import logging

import pytest

from tests.batching.alone import alone, prompt, tiny
from tests.batching.faults import batching, reasons, tokens

pytestmark = pytest.mark.timeout(20)

COUNT = 256
"""Positions of the tiny models."""
WITH_TABLE = ["gpt2", "opt", "gptj", "ctrl"]
"""Learned, learned with two more entries, and computed ones."""
WITHOUT_TABLE = ["llama", "bloom", "xglm"]
GREEDY = {"do_sample": False, "progress_bar": False}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "max_position_embeddings" in record.getMessage()]


@pytest.mark.parametrize("name", WITH_TABLE)
def test_a_table_of_positions_ends_a_request(name, caplog):
    """All tokens that `generate` can give, "length", and nobody beside it suffers; the model itself can do no more."""
    of, long, short = tiny(name), prompt(COUNT - 6, 1), prompt(9, 2)
    with pytest.raises((IndexError, RuntimeError)):
        alone(of, long, do_sample=False, max_new_tokens=8)
    with batching(name) as batcher:
        outputs = batcher.generate([long, short, long], max_new_tokens=[20, 8, 7], **GREEDY)
    assert reasons(outputs) == ["length"] * 3
    (right,), (other,) = (alone(of, ids, do_sample=False, max_new_tokens=n) for ids, n in ((long, 7), (short, 8)))
    assert tokens(outputs) == [right, other, right]
    assert warnings(caplog) == [
        f"a request may have {COUNT + 14} tokens, {type(of).__name__} has {COUNT} positions (max_position_embeddings): it "
        "ends there"
    ]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "seed": 3}])
def test_all_rows_end_there(options):
    """Beams and several answers end where one answer does, with what `generate` gives for so many tokens."""
    of, ids = tiny("gpt2"), prompt(COUNT - 6, 1)
    with batching("gpt2") as batcher:
        (output,) = batcher.generate([ids], max_new_tokens=50, **{**GREEDY, **options})
    assert output.finish_reason == "length"
    found = alone(of, ids, max_new_tokens=7, **{"do_sample": False, **options})
    assert output.sequences == found


@pytest.mark.parametrize("name", WITH_TABLE[:2])
def test_a_prompt_longer_than_the_table(name):
    """It alone is rejected and says why; a prompt as long as the table gets its one token."""
    of, longest = tiny(name), prompt(COUNT, 1)
    with batching(name) as batcher:
        outputs = batcher.generate([longest, prompt(COUNT + 1, 2)], max_new_tokens=5, **GREEDY)
    assert reasons(outputs) == ["length", "rejected"]
    assert outputs[0].generated_tokens == alone(of, longest, do_sample=False, max_new_tokens=1)[0]
    wrong = f"prompt 1: the prompt has {COUNT + 1} tokens, {type(of).__name__} has {COUNT} positions"
    assert str(outputs[1].error).startswith(wrong)


@pytest.mark.parametrize("name", WITHOUT_TABLE)
def test_computed_positions_go_on(name, caplog):
    """What `generate` gives beyond the positions of the config, and one warning for all requests of a batcher."""
    of, ids = tiny(name), [prompt(COUNT - 2, 1), prompt(COUNT + 5, 2)]
    with caplog.at_level(logging.WARNING, logger="paged_cache"), batching(name) as batcher:
        outputs = batcher.generate(ids, max_new_tokens=6, **GREEDY)
    assert tokens(outputs) == [alone(of, one, do_sample=False, max_new_tokens=6)[0] for one in ids]
    has_limit = getattr(of.config, "max_position_embeddings", None) is not None
    assert len(warnings(caplog)) == has_limit
    assert not has_limit or "answers may be worse there" in caplog.text


def test_enough_positions_are_no_news(caplog):
    """A request that just fits gives no warning."""
    for name, most in (("gpt2", COUNT + 1), ("llama", COUNT)):
        with batching(name) as batcher:
            (output,) = batcher.generate([prompt(COUNT - 6, 1)], max_length=most, **GREEDY)
        assert len(output.generated_tokens) == most - COUNT + 6
    assert warnings(caplog) == []
