"""Calls that are done again without being looked at: further layers of a step, further steps on the same tables."""

import gc
import importlib
import threading
import weakref
from unittest import mock

import pytest
import torch

from paged_cache.kernels import paged_attention
from paged_cache.kernels.memo import REPEAT
from paged_cache.kernels.reference import paged_attention as reference

pytest.importorskip("numba")
cpu = importlib.import_module("paged_cache.kernels.cpu.attention")

HEADS, KV_HEADS, DIM, SIZE, BLOCKS = 8, 4, 32, 16, 12


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The CPU kernel, with nothing remembered."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", "cpu")
    dispatch = importlib.import_module("paged_cache.kernels.dispatch")
    dispatch.forget()
    cpu._recent.clear()
    yield
    cpu._recent.clear()
    dispatch.forget()


@pytest.fixture
def prepared():
    """Counts the calls that were checked and planned."""
    with mock.patch.object(cpu, "_prepare", wraps=cpu._prepare) as prepare:
        yield lambda: prepare.call_count


class Rows:
    """Tables and lengths of two rows, as they are kept from step to step."""

    def __init__(self):
        self.table = torch.randperm(BLOCKS, dtype=torch.int32).view(2, -1)
        self.lens = torch.tensor([3, 40], dtype=torch.int32)

    def attend(self, memo, layer=None, q_len=1, scale=0.2, **options):
        """One layer, compared with the reference."""
        query, keys, values = layer or new_layer(q_len)
        out = paged_attention(query, keys, values, self.table, self.lens, scale=scale, memo=memo, **options)
        expected = reference(query, keys, values, self.table, self.lens, scale=scale, **options)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def new_layer(q_len=1, dtype=torch.float32, width=DIM):
    """Query, keys and values."""
    query = torch.randn(2, HEADS, q_len, width, dtype=dtype)
    return (query, *torch.randn(2, BLOCKS, SIZE, KV_HEADS, width, dtype=dtype))


def test_layers_and_steps_are_planned_once(prepared):
    """Layers with tensors of their own and steps with longer rows are computed by one plan."""
    rows = Rows()
    for _ in range(5):
        memo = {}
        for _ in range(3):
            rows.attend(memo)
        assert any(REPEAT in key for key in memo)
        rows.lens += 1

    assert prepared() == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: new_layer(q_len=2),
        lambda: new_layer(dtype=torch.bfloat16),
        lambda: new_layer(width=16),
        lambda: tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in new_layer(q_len=2)),
        lambda: (new_layer()[0], *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in new_layer()[1:])),
    ],
    ids=["queries", "dtype", "width", "query strides", "cache strides"],
)
def test_another_kind_of_layer_is_planned_anew(other, prepared):
    """In the middle of a step, and the kind that was there before goes on with its own plan."""
    rows, memo, tensors = Rows(), {}, other()
    rows.attend(memo)
    tolerant = tensors[0].dtype is torch.float32
    if tolerant:
        rows.attend(memo, tensors)
    else:
        out = paged_attention(*tensors, rows.table, rows.lens, scale=0.2, memo=memo)
        expected = reference(*(x.float() for x in tensors), rows.table, rows.lens, scale=0.2)
        torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    rows.attend(memo)

    assert prepared() in (2, 3)  # the first kind again, where the other one needed a larger workspace


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "position_bias"])
def test_what_layers_add_is_not_forgotten(name):
    """A layer with sinks, slopes or a bias behind one without, and again one without."""
    rows, memo = Rows(), {}
    added = torch.randn(1, HEADS, 1, BLOCKS // 2 * SIZE) if name == "position_bias" else torch.randn(HEADS)
    for options in ({}, {name: added}, {}, {name: added * 2}):
        rows.attend(memo, **options)


def test_steps_with_other_tables_threads_or_options_are_planned_anew(prepared):
    """Nothing of an earlier plan is used where tables moved, threads or the options are others."""
    rows, threads = Rows(), torch.get_num_threads()
    rows.attend({})
    rows.table = rows.table.clone()
    rows.attend({})
    rows.lens = rows.lens.clone()
    rows.attend({})
    rows.attend({}, scale=0.3)
    rows.attend({}, window=7)
    try:
        torch.set_num_threads(threads + 1)
        rows.attend({})
    finally:
        torch.set_num_threads(threads)

    assert prepared() == 6


@pytest.mark.parametrize(
    "other",
    [{"scale": 0.3}, {"window": 7}, {"chunk": 8}, {"softcap": 0.5}, {"kv_starts": torch.tensor([1, 5])}],
    ids=str,
)
def test_another_call_with_the_same_memo(other):
    """A memo is meant for calls that differ in their tensors only; nobody gets the answer of another call all the same."""
    rows, memo = Rows(), {}
    rows.attend(memo)
    rows.attend(memo, **other)
    rows.attend(memo)


def test_views_of_lengths_at_the_same_address():
    """Lengths with another stride begin where the others began."""
    rows, buffer = Rows(), torch.tensor([3, 40, 17, 5], dtype=torch.int32)
    for lens in (buffer[:2], buffer[::2]):
        rows.lens = lens
        rows.attend({})


def work(seen):
    """A step whose table and workspace nobody else has."""
    rows = Rows()
    rows.attend({})
    launching = importlib.import_module("paged_cache.kernels.cpu.launching")
    seen.extend(map(weakref.ref, (rows.table, launching._threads.workspace)))


def test_nothing_is_kept_alive():
    """Neither tables nor the workspace of a thread that ended."""
    seen = []
    thread = threading.Thread(target=work, args=(seen,))
    thread.start()
    thread.join(60)
    del thread
    gc.collect()

    assert cpu._recent
    assert [ref() for ref in seen] == [None, None]


def test_converted_tables_are_not_kept(prepared):
    """A table that the kernel copies into its own dtype may change behind the copy."""
    rows = Rows()
    rows.table = rows.table.long()
    rows.attend({})
    rows.table[:] = rows.table.flip(0)
    rows.attend({})

    assert prepared() == 2


def test_few_plans_are_kept():
    """Plans hold tensors, so that there is an end to how many are kept."""
    for _ in range(2 * cpu.MOST_RECENT):
        Rows().attend({})

    assert 0 < len(cpu._recent) <= cpu.MOST_RECENT


def test_gradients_are_not_lost():
    """A layer whose queries want a gradient goes to the reference, also behind one that did not."""
    rows, memo, (query, *caches) = Rows(), {}, new_layer()
    rows.attend(memo)
    query.requires_grad_()
    paged_attention(query, *caches, rows.table, rows.lens, scale=0.2, memo=memo).sum().backward()

    assert query.grad is not None
