"""How many requests fit, by hand on a model of one layer with one head: one token takes 2 × 8 × 4 = 64 bytes."""

import pytest
import torch
from transformers import LlamaConfig

from paged_cache import BlockPool
from paged_cache.errors import InvalidRequestError
from paged_cache.planning import plan, read_trace
from paged_cache.planning.traces import usual_requests
from paged_cache.sizes import parse_memory
from tests import models

ONE_LAYER = LlamaConfig(
    num_hidden_layers=1,
    hidden_size=8,
    num_attention_heads=1,
    intermediate_size=8,
    vocab_size=16,
    max_position_embeddings=64,
)
BLOCK = 4 * 64
MEMORY = 100 * BLOCK


def planned(memory=MEMORY, **options):
    """The plan for 100 blocks of 4 tokens, with contiguous rows of 64."""
    return plan(ONE_LAYER, **{"memory": memory, "overhead": 0, "with_weights": False, "block_size": 4, **options})


def test_one_length():
    """10 + 7 tokens, of which 16 are kept: 4 blocks; a contiguous row reserves 64 tokens."""
    made = planned(prompt_len=10, output_len=7)

    assert made.num_blocks == 100
    assert (made.paged.num_requests, made.padded.num_requests, made.contiguous.num_requests) == (25, 25, 6)
    assert made.paged.bytes_per_request == 4 * BLOCK


def test_the_last_block_counts_whole():
    """One token more than 4 blocks hold takes a fifth."""
    assert planned(prompt_len=11, output_len=7).paged.num_requests == 20


def test_mixed_lengths():
    """Rows of a padded batch are as long as the longest prompt and output together; blocks are as many as needed."""
    made = planned(requests=[(2, 2), (2, 40), (20, 2)])

    assert made.padded.bytes_per_request == 59 * 64  # 20 + 40 - 1
    assert made.paged.bytes_per_request == (1 + 11 + 6) / 3 * BLOCK
    assert (made.padded.num_requests, made.paged.num_requests) == (6, 16)


def test_a_shared_prefix_is_kept_once():
    """18 tokens that all begin with: 4 full blocks once, the other two tokens in each request."""
    made = planned(prompt_len=4, output_len=3, shared_prefix_len=18)

    assert made.paged.shared_bytes == 4 * BLOCK
    assert made.paged.bytes_per_request == 2 * BLOCK  # tokens 16 to 23 of 24
    assert made.paged.num_requests == 48
    assert made.padded.num_requests == MEMORY // (24 * 64)


def test_beams_share_the_prompt():
    """3 beams of 10 + 7 tokens: 2 full blocks of the prompt once, 2 more for each beam."""
    made = planned(prompt_len=10, output_len=7, num_beams=3)

    assert made.paged.num_requests == 100 // (2 + 3 * 2)
    assert made.contiguous.num_requests == 100 // (3 * 16)


def test_one_line_per_length():
    """Requests by length, up to the context."""
    made = planned(context=2000, memory=1000 * BLOCK)

    assert [(line.num_tokens, line.paged, line.contiguous) for line in made.contexts] == [(1024, 3, 2), (2000, 2, 2)]
    assert any("beyond that" in note for note in made.notes)


def test_reserve():
    """The reserve is a share of all memory, and blocks are made of the rest."""
    made = planned(overhead=0.25)

    assert (made.overhead, made.available, made.num_blocks) == (MEMORY // 4, MEMORY * 3 // 4, 75)


def test_a_share_is_one_in_words_and_in_numbers():
    """A string such as "0.5" is the share that 0.5 is, in Python as in the command; a unit makes it a size."""
    cpu = torch.device("cpu")

    assert parse_memory("0.5", cpu) == pytest.approx(parse_memory(0.5, cpu), rel=0.05)
    assert parse_memory("1", cpu) > 2**28
    assert parse_memory("0.5GiB", cpu) == 2**29
    assert parse_memory("24", cpu) == parse_memory(24, cpu) == 24


def test_bytes_that_were_meant_to_be_more_are_doubted():
    """A pool of a string of few bytes names the unit that may be missing; a pool takes a share as a string."""
    model = models.model("gpt2")

    with pytest.raises(InvalidRequestError, match=r"24 without a unit are bytes; did you mean '24GiB'\?"):
        BlockPool.for_model(model, memory="24")
    assert BlockPool.for_model(model, memory="0.001").num_blocks > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_len": 60, "output_len": 5}, "longest request has 65 tokens, the context is 64"),
        ({"prompt_len": 0}, "prompt_len is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"shared_prefix_len": -1}, "shared_prefix_len is -1"),
        ({"requests": [(3, 3)], "prompt_len": 3}, "lengths of their own"),
        ({"requests": []}, "at least one token"),
        ({"context": -3}, "context is -3"),
        ({"context": 0}, "context is 0"),
        ({"weights_memory": "3GiB", "with_weights": False}, "weights_memory is '3GiB', but the weights are left out"),
        ({"weights_memory": "0.5", "with_weights": True}, "weights_memory is '0.5'; it is no share"),
        ({"weights_memory": 0.5, "with_weights": True}, "weights_memory is 0.5; it is no share"),
        ({"weights_memory": "3", "with_weights": True}, "did you mean '3GiB'"),
        ({"overhead": 1.0}, "overhead is 1.0"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"kv_dtype": "int4"}, "kv_dtype is 'int4'"),
        ({"block_size": 5}, "block_size is 5"),
        ({"memory": "3 apples"}, "memory is '3 apples'"),
        ({"memory": "0GiB"}, "memory is 0 B"),
        ({"memory": 100}, "one block alone takes 256"),
    ],
)
def test_what_cannot_be_planned_is_said(options, message):
    """A wrong value is named, with what would be right."""
    with pytest.raises(InvalidRequestError, match=message):
        planned(**options)


def test_the_trace_of_the_package():
    """256 conversations, divided by a scale; paging fits more of them than rows as long as the longest."""
    requests = read_trace("azure", 64)
    made = planned(requests=requests, context=200, memory="10MiB")

    assert len(requests) == 256
    assert min(map(min, requests)) >= 1
    assert made.paged.num_requests > 2 * made.padded.num_requests


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\n3,4\n", "needs prompt and output"),
        ("prompt,output\n", "no requests"),
        ("prompt,output\n3,4\n3,many\n", "line 3 of .* has the length 'many'"),
        ("prompt,output\n0,4\n", "has the length '0'"),
    ],
)
def test_bad_traces_are_named(tmp_path, text, message):
    """A file without the columns, without requests, or with a length that is none."""
    (tmp_path / "trace.csv").write_text(text)

    with pytest.raises(InvalidRequestError, match=message):
        read_trace(tmp_path / "trace.csv")


@pytest.mark.parametrize("most", [2, 64, 1000, 4096, 100_000])
def test_usual_lengths_fit(most):
    """The longest prompt and the longest output fit together, nearly; where all fits, lengths are the trace's own."""
    requests, words = usual_requests(most)
    width = sum(map(max, zip(*requests, strict=True)))

    assert len(requests) == 256
    assert 0.9 * min(most, 4701) <= width <= most
    assert ("divided" in words) == (most < 4701)


def test_a_trace_that_is_missing_is_named():
    """No file of that name: the message says what could be given. A scale of 0 divides nothing."""
    with pytest.raises(InvalidRequestError, match=r"no trace nowhere\.csv"):
        read_trace("nowhere.csv")
    with pytest.raises(InvalidRequestError, match="scale of the trace is 0"):
        read_trace("azure", 0)
