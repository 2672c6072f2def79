"""`PackedCache`: one forward over rows side by side gives what each row gives alone."""

import pytest
import torch

import paged_cache
from paged_cache import UnsupportedModelError
from paged_cache.memory.growth import Growth
from paged_cache.packed import PackedCache
from tests.batching.alone import prompt, tiny
from tests.models import assert_whole, poisoned_pool

NAMES = ["llama", "gemma2", "mistral", "gpt2"]


class Rows:
    """Sequences on a pool, grown by packed forwards of a patched model."""

    def __init__(self, name, count, num_blocks=200):
        self.of = tiny(name)
        self.pool = poisoned_pool(self.of, num_blocks)
        self.cache = PackedCache(self.pool)
        self.sequences = [self.pool.manager.new_sequence() for _ in range(count)]

    def begin(self, numbers, pieces):
        """Opens a step in which these rows get these tokens."""
        growths = [Growth(self.sequences[i], len(ids), ids) for i, ids in zip(numbers, pieces, strict=True)]
        slots = self.pool.manager.extend(growths).slots
        rows = [self.sequences[i] for i in numbers]
        self.cache.begin(rows, list(map(len, pieces)), [[s for row in group for s in row] for group in slots])
        return rows

    def forward(self, numbers, pieces):
        """Logits of all new tokens, row by row."""
        positions = [
            range(self.sequences[i].num_tokens, self.sequences[i].num_tokens + len(ids))
            for i, ids in zip(numbers, pieces, strict=True)
        ]
        rows = self.begin(numbers, pieces)
        with torch.no_grad():
            output = self.of(
                input_ids=torch.tensor([[token for ids in pieces for token in ids]]),
                position_ids=torch.tensor([[position for row in positions for position in row]]),
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache.end()
        self.pool.manager.commit_all(rows)
        return output.logits[0].split(list(map(len, pieces)))


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_packed_rows(name):
    """Prompts, pieces of prompts and single tokens of several rows in one forward: each token's logits are those it has alone."""
    ids = [prompt(length, seed) for seed, length in enumerate((9, 23, 5))]
    steps = [((0, 1), (4, 1)), ((1, 2), (7, 5)), ((0, 1), (1, 14)), ((1, 0), (1, 4))]
    rows, found = Rows(name, 3), [[], [], []]
    with torch.no_grad():
        want = [rows.of(torch.tensor([row])).logits[0] for row in ids]
    with paged_cache.patch(rows.of):
        for numbers, counts in steps:
            starts = [rows.sequences[i].num_tokens for i in numbers]
            pieces = [ids[i][start : start + n] for i, start, n in zip(numbers, starts, counts, strict=True)]
            for i, logits in zip(numbers, rows.forward(numbers, pieces), strict=True):
                found[i].append(logits)
            assert rows.cache.num_updates == len(rows.pool.spec.layers)
            rows.pool.check()
    for logits, right in zip(found, want, strict=True):
        torch.testing.assert_close(torch.cat(logits), right, atol=2e-4, rtol=2e-4)  # float32 in another order
    for sequence in rows.sequences:
        rows.pool.manager.release(sequence)
    assert_whole(rows.pool)


def test_what_a_step_says():
    """Ends of rows, lengths, longest row and written slots are those of the rows that take part."""
    rows = Rows("llama", 2)
    rows.begin([0, 1], [prompt(6), prompt(3)])
    step = rows.cache.step
    assert (step.q_len, step.max_q_len) == (9, 6)
    (group,) = step.groups
    assert group.lengths.cu_seqlens_q.tolist() == [0, 6, 9]
    assert group.lengths.seq_lens.tolist() == [6, 3]
    assert group.lengths.cu_seqlens_q.dtype == group.lengths.seq_lens.dtype == torch.int32
    table = group.block_table
    size = rows.pool.block_size
    places = [(row, position) for row, length in enumerate((6, 3)) for position in range(length)]
    assert group.slots.tolist() == [int(table[row, i // size]) * size + i % size for row, i in places]
    rows.cache.end()
    assert rows.cache.step is None


def test_tables_follow_rows_that_come_and_go():
    """The block table of each step is that of its rows, in their order, whatever the step before was."""
    rows = Rows("llama", 4)
    for numbers, counts in (((0, 1, 2), (5, 9, 1)), ((2, 0), (1, 1)), ((3, 1), (12, 1)), ((1, 3, 0, 2), (3, 1, 4, 1))):
        begun = rows.begin(numbers, [prompt(count) for count in counts])
        table = rows.cache.step.groups[0].block_table
        assert len(table) == len(numbers)
        for row, sequence in zip(table.tolist(), begun, strict=True):
            assert row[: len(sequence.tables[0])] == sequence.tables[0]
        rows.cache.end()
        rows.pool.manager.commit_all(begun)


@pytest.mark.parametrize("shape", [(2, 2, 4, 8), (1, 2, 3, 8), (1, 2, 5, 8)])
def test_keys_of_another_shape(shape):
    """Keys that are not one row of as many tokens as the step are refused, and so is an update without a step."""
    rows = Rows("llama", 1)
    spec = rows.pool.spec.layers[0]
    heads, dim = rows.of.config.num_key_value_heads, rows.of.config.head_dim
    assert spec.window is None
    keys = torch.zeros(shape[0], heads, shape[2], dim)
    with pytest.raises(UnsupportedModelError, match="outside a packed step"):
        rows.cache.layers[0].update(torch.zeros(1, heads, 4, dim), torch.zeros(1, heads, 4, dim))
    rows.begin([0], [prompt(4)])
    with pytest.raises(UnsupportedModelError, match="outside a packed step"):
        rows.cache.layers[0].update(keys, keys)
    rows.cache.layers[0].update(torch.zeros(1, heads, 4, dim), torch.zeros(1, heads, 4, dim))
    assert rows.cache.num_updates == 1


def test_rows_have_no_dense_form():
    """A layer that does not leave attention to a kernel is told that its rows cannot be packed."""
    rows = Rows("llama", 2)
    heads, dim = rows.of.config.num_key_value_heads, rows.of.config.head_dim
    rows.begin([0, 1], [prompt(4), prompt(2)])
    keys, values = rows.cache.layers[0].update(torch.zeros(1, heads, 6, dim), torch.zeros(1, heads, 6, dim))
    with pytest.raises(UnsupportedModelError, match="cannot be packed"):
        keys + values


def test_what_transformers_asks_a_cache():
    """Positions come with the tokens: no length so far, masks as for a prompt, and no maximum."""
    cache = Rows("gemma2", 1).cache
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(7, 0) == (7, 0)
    assert len(cache.layers) == tiny("gemma2").config.num_hidden_layers
    assert {layer.is_sliding for layer in cache.layers} == {True, False}
