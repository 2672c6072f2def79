"""The pool as the scheduler sees it: what requests need, share and give back."""

import copy

import peft
import pytest
import torch

from paged_cache.batching.pool_memory import PoolMemory
from paged_cache.batching.request import Chunk, Request, Row
from paged_cache.memory.growth import Growth
from tests.batching.alone import prompt, tiny
from tests.models import assert_whole, poisoned_pool

BLOCK = 4


def make(name="llama", num_blocks=100, shares=True):
    """A memory on a fresh pool."""
    pool = poisoned_pool(tiny(name), num_blocks, BLOCK)
    return PoolMemory(pool, shares_prefixes=shares), pool


def make_request(ids, max_new_tokens=8, num_rows=1, salt=None):
    """A request with one row, that waits."""
    return Request("r", ids, max_new_tokens, num_rows=num_rows, cache_salt=salt, rows=[Row(list(ids))])


def compute(pool, request, row, num_tokens):
    """What a forward does to the bookkeeping."""
    tokens = row.tokens[row.num_computed : row.num_computed + num_tokens]
    pool.manager.extend([Growth(row.sequence, len(tokens), tokens)])
    pool.manager.commit(row.sequence)
    row.num_computed += num_tokens


def in_use(pool):
    """Blocks that are held."""
    pool.check()
    return pool.num_blocks - pool.num_free


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_growth_is_never_less_than_what_is_taken(name):
    """Blocks taken by computing any piece are at most what was said before, in models with windows, too."""
    for piece in (1, 3, 4, 7, 30):
        memory, pool = make(name)
        request = make_request(prompt(30))
        memory.admit(request)
        (row,) = request.rows
        while row.num_computed < 30:
            count = min(piece, 30 - row.num_computed)
            said, before = memory.growth(row, count), in_use(pool)
            compute(pool, request, row, count)
            assert in_use(pool) - before <= said
            if name == "llama":
                assert in_use(pool) - before == said
                assert in_use(pool) == memory.blocks_for(row.num_computed)
            assert in_use(pool) <= memory.blocks_at_most(make_request(prompt(30), 1), whole_prompt=True)
            assert in_use(pool) <= memory.blocks_for(row.num_computed) + said
        memory.release(request)
        assert_whole(pool)


def test_blocks_of_windows():
    """A layer group with a window holds no more than its window, wherever that begins in a block."""
    memory, pool = make("gemma2")
    windows = sorted(window or 0 for window in pool.storage.layout.windows)
    assert windows[0] == 0 < windows[-1]
    window = windows[-1]
    assert memory.blocks_for(1) == 2
    assert memory.blocks_for(1000) == 250 + (window + BLOCK - 2) // BLOCK + 1


@pytest.mark.parametrize("num_rows", [1, 3])
def test_blocks_at_most(num_rows):
    """A request at its longest holds exactly what was said: rows share the prompt's full blocks and nothing else."""
    for length in (7, 8, 9):
        memory, pool = make()
        request = make_request(prompt(length), max_new_tokens=6, num_rows=num_rows)
        most = memory.blocks_at_most(request, whole_prompt=False)
        memory.admit(request)
        compute(pool, request, request.rows[0], length)
        request.rows = memory.fork(request.rows[0], num_rows)
        for token in range(5):
            for number, row in enumerate(request.rows):
                row.tokens.append(100 + 10 * number + token)
                compute(pool, request, row, 1)
        assert in_use(pool) == most
        memory.release(request)
        assert_whole(pool)


def grow(memory, request, num_tokens, most):
    """Rows decode to a length, a token each at a time; never with more blocks than were said."""
    for token in range(num_tokens):
        for number, row in enumerate(request.rows):
            row.tokens.append(100 + 10 * number + token)
            compute(memory.pool, request, row, 1)
            assert in_use(memory.pool) <= most


@pytest.mark.parametrize("whole_prompt", [False, True])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(("length", "num_new"), [(9, 3), (40, 20), (5, 60)])
def test_rows_that_lost_their_blocks_fit_again(name, shares, whole_prompt, length, num_new):
    """Several rows that are computed anew, one after the other, need no more blocks than were said at `submit`."""
    memory, pool = make(name, shares=shares, num_blocks=300)
    memory.begin_step([])
    request = make_request(prompt(length), max_new_tokens=2 * num_new + 1, num_rows=3)
    most = memory.blocks_at_most(request, whole_prompt)
    memory.admit(request)
    for _ in range(length):
        compute(pool, request, request.rows[0], 1)
    request.rows = memory.fork(request.rows[0], 3)
    grow(memory, request, num_new, most)
    pool.manager.clear_prefix_cache()
    memory.release(request)
    pool.manager.clear_prefix_cache()
    memory.admit(request)
    for row in request.rows:
        while row.num_computed < row.num_tokens:
            compute(pool, request, row, row.num_tokens - row.num_computed if whole_prompt else 1)
        assert in_use(pool) <= most
    grow(memory, request, num_new, most)
    if name == "llama" and not shares:
        assert in_use(pool) == most
    memory.release(request)
    assert_whole(pool)


def test_logits_go_with_the_blocks():
    """Logits that wait for those of sister rows are given up with the blocks, since they will come again."""
    memory, _ = make()
    request = make_request(prompt(5))
    memory.admit(request)
    request.held = {id(request.rows[0]): torch.zeros(3)}
    memory.release(request)
    assert request.held == {}


def test_shared_blocks_count_when_they_are_written():
    """The first token of a forked row takes a block more where the last one is shared and not full."""
    memory, pool = make()
    request = make_request(prompt(6))
    memory.admit(request)
    compute(pool, request, request.rows[0], 6)
    request.rows = memory.fork(request.rows[0], 2)
    assert [memory.growth(row, 1) for row in request.rows] == [1, 1]
    request.rows[0].tokens.append(9)
    compute(pool, request, request.rows[0], 1)
    assert [memory.growth(row, 1) for row in request.rows] == [0, 0]
    memory.release(request)
    assert_whole(pool)


def test_look_changes_nothing():
    """Looking says what an admission gives, holds nothing afterwards, and counts no query."""
    memory, pool = make()
    first = make_request(prompt(18))
    memory.begin_step([])
    assert memory.look(first).num_cached == 0
    memory.admit(first)
    compute(pool, first, first.rows[0], 18)
    queries = pool.manager.counters.prefix_queries
    second = make_request([*prompt(18)[:13], 1, 2, 3, 4, 5])
    before = in_use(pool)
    prefix = memory.look(second)
    assert (prefix.num_cached, prefix.is_coming, prefix.idle_blocks) == (12, False, 0)
    assert in_use(pool) == before
    assert pool.manager.counters.prefix_queries == queries
    memory.release(first)
    assert memory.look(second)[:3] == (12, False, 3)
    memory.admit(second)
    assert second.rows[0].num_computed == second.cached_tokens == 12
    assert in_use(pool) == 3
    memory.release(second)
    assert second.rows[0].num_computed == 0
    assert_whole(pool)


def test_a_known_prompt_leaves_a_token_to_compute():
    """Of a prompt that the pool has as a whole the last token is computed again, for its logits."""
    memory, pool = make()
    for expected in (0, 7):
        request = make_request(prompt(8))
        memory.begin_step([])
        memory.admit(request)
        assert request.rows[0].num_computed == expected
        compute(pool, request, request.rows[0], 8 - expected)
        memory.release(request)
    assert_whole(pool)


@pytest.mark.parametrize(
    "salts", [("a", "b"), (1, True), (1, "1"), (None, 0), ((1,), (True,)), (("a", (1, 2)), ("a", (1.0, 2)))]
)
def test_salts(salts):
    """Requests of different salts share nothing, also where Python calls the salts equal."""
    memory, pool = make()
    memory.begin_step([])
    one, other, again = (make_request(prompt(12), salt=salt) for salt in (*salts, salts[0]))
    memory.admit(one)
    compute(pool, one, one.rows[0], 12)
    assert memory.look(other).num_cached == 0
    assert memory.look(again).num_cached == 11


def test_sharing_off():
    """Where rows have states outside the pool no prefix is taken."""
    memory, pool = make(shares=False)
    first = make_request(prompt(12))
    memory.admit(first)
    compute(pool, first, first.rows[0], 12)
    assert memory.look(make_request(prompt(12))).num_cached == 0
    second = make_request(prompt(12))
    memory.admit(second)
    assert second.rows[0].num_computed == 0
    assert pool.manager.counters.prefix_queries == 0


def test_what_is_coming():
    """A prompt whose next block is computed in this very step had better wait for it; a different one need not."""
    memory, pool = make()
    memory.begin_step([])
    first = make_request(prompt(18))
    memory.admit(first)
    assert not memory.look(make_request(prompt(18))).is_coming
    memory.expect(Chunk(first, first.rows[0], 3))
    assert not memory.look(make_request(prompt(18))).is_coming  # not a full block
    memory.expect(Chunk(first, first.rows[0], 9))
    assert memory.look(make_request(prompt(18))).is_coming
    assert not memory.look(make_request([1, *prompt(18)])).is_coming
    assert not memory.look(make_request(prompt(18), salt="other")).is_coming
    compute(pool, first, first.rows[0], 9)
    memory.begin_step([first])
    prefix = memory.look(make_request(prompt(18)))
    assert (prefix.num_cached, prefix.is_coming) == (8, False)


def test_select():
    """Rows go on from the rows that are named: forked where twice, given back where never, untouched where nothing changes."""
    memory, pool = make()
    request = make_request(prompt(9))
    memory.admit(request)
    compute(pool, request, request.rows[0], 9)
    rows = memory.fork(request.rows[0], 3)
    for number, row in enumerate(rows):
        row.tokens.append(100 + number)
        compute(pool, request, row, 1)
    assert memory.select(rows, [0, 1, 2]) is rows
    chosen = memory.select(rows, [2, 0, 2])
    assert [row.tokens[-1] for row in chosen] == [102, 100, 102]
    assert len({id(row) for row in chosen}) == len({id(row.tokens) for row in chosen}) == 3
    assert rows[1].sequence is None
    assert [row.num_computed for row in chosen] == [10, 10, 10]
    request.rows = chosen
    memory.release(request)
    assert_whole(pool)


def test_changed_weights_end_sharing():
    """When what K and V depend on changes, nobody takes what was computed before, running rows included."""
    memory, pool = make()
    memory.begin_step([])
    first = make_request(prompt(6))
    memory.admit(first)
    compute(pool, first, first.rows[0], 6)
    weight = tiny("llama").model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        weight.mul_(1.0)  # its version counter says that something changed
    memory.begin_step([first])
    first.rows[0].tokens += prompt(6, 5)
    compute(pool, first, first.rows[0], 6)
    memory.begin_step([first])
    assert memory.look(make_request(first.rows[0].tokens)).num_cached == 0


def test_adapters_that_come_and_go_end_sharing():
    """What a running row computes while adapters are in the model is not taken for the model's own once they are gone."""
    of = copy.deepcopy(tiny("llama"))
    memory = PoolMemory(poisoned_pool(of, 100, BLOCK), shares_prefixes=True)
    memory.begin_step([])
    first = make_request(prompt(6))
    memory.admit(first)
    compute(memory.pool, first, first.rows[0], 6)
    memory.begin_step([first])
    wrapped = peft.get_peft_model(of, peft.LoraConfig(r=4, target_modules=["k_proj"])).eval()
    memory.begin_step([first])
    first.rows[0].tokens += prompt(6, 5)
    compute(memory.pool, first, first.rows[0], 6)
    wrapped.unload().eval()
    memory.begin_step([first])
    assert memory.look(make_request(first.rows[0].tokens)).num_cached == 4
