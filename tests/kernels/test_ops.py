"""The operators that stand for kernels in traced graphs."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from paged_cache.kernels import dispatch, paged_attention, reference
from tests.kernels.cases import Case, build

NAMES = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
CASES = {
    "plain": Case(),
    "all but a packed form": Case(
        q_len=3, window=20, chunk=32, softcap=30.0, sinks=True, alibi=True, bias=1, starts=(3, 0, 7, 0)
    ),
    "packed, 8 bits": Case(q_lens=(3, 1, 20, 0), kv_dtype=torch.int8),
    "other value dimension": Case(head_dim=48, v_head_dim=32),
}
ops = torch.ops.paged_cache


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What other tests compiled does not count."""
    torch._dynamo.reset()


def tensors(inputs):
    """Positional arguments of the call."""
    return tuple(getattr(inputs, name) for name in NAMES)


def layer(query, key_cache, value_cache, block_table, seq_lens, options):
    """Attention with something around it that a compiler can fuse."""
    return paged_attention(query * 2, key_cache, value_cache, block_table, seq_lens, **options) + 1


def names_of(graph):
    """Operators of ours in a graph."""
    return [str(node.target) for node in graph.graph.nodes if "paged_cache" in str(node.target)]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_a_proper_operator(name):
    """Schema, fake tensors and tracing with dynamic shapes."""
    inputs = build(CASES[name])
    torch.library.opcheck(ops.attention.default, tensors(inputs), inputs.options)


def test_write_kv_is_a_proper_operator():
    """Likewise, and it says what it writes to."""
    keys, cache, slots = torch.randn(3, 2, 8), torch.zeros(5, 4, 2, 8), torch.tensor([7, -1, 0])
    torch.library.opcheck(ops.write_kv.default, (keys, keys, cache, cache.clone(), slots))
    codes, scales = cache.to(torch.int8), torch.zeros(5, 4, 2)
    options = {"key_scales": scales, "value_scales": scales.clone()}
    torch.library.opcheck(ops.write_kv.default, (keys, keys, codes, codes.clone(), slots), options)


def test_copy_blocks_is_a_proper_operator():
    """Likewise, with lists of tensors."""
    slabs, pairs = [torch.randn(4, 6), torch.randn(4, 3)], torch.tensor([[0, 2], [1, 3]])
    torch.library.opcheck(ops.copy_blocks.default, (slabs, [x.clone() for x in slabs], pairs))


@pytest.mark.parametrize("name", CASES)
def test_traced_attention_is_one_operator(name):
    """A full graph gives what the call gives without a compiler."""
    inputs, backend = build(CASES[name]), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    actual = compiled(*tensors(inputs), inputs.options)

    assert torch.equal(actual, layer(*tensors(inputs), inputs.options))
    assert [names_of(graph) for graph in backend.graphs] == [["paged_cache.attention"]]


def test_one_graph_for_all_lengths():
    """Rows, tokens and the width of the block table are dynamic."""
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for lens, q_len, spare in (((37, 5, 90), 5, 0), ((9, 64, 20, 70, 200), 4, 7), ((7, 8), 6, 4)):
        inputs = build(Case(lens=lens, q_len=q_len, spare_blocks=spare))
        assert torch.equal(compiled(*tensors(inputs), inputs.options), layer(*tensors(inputs), inputs.options))
    assert len(backend.graphs) == 1


def step(keys, values, slots, query, key_cache, value_cache, block_table, seq_lens):
    """What a layer does: write, then attend to what was written."""
    dispatch.write_kv(keys, values, key_cache, value_cache, slots)
    return paged_attention(query, key_cache, value_cache, block_table, seq_lens, scale=0.125).sin()


def new_tokens(inputs):
    """Random K and V for the last token of each row that has one, and their slots."""
    last = inputs.seq_lens.long() - 1
    blocks = inputs.block_table.long().gather(1, last.clamp(min=0)[:, None] // 16)[:, 0]
    slots = torch.where(last >= 0, blocks * 16 + last % 16, -1)
    return torch.randn(len(slots), 2, 64), torch.randn(len(slots), 2, 64), slots


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_graph_that_writes_and_reads(backend):
    """Attention in the same graph sees the tokens, and so does the pool afterwards; nothing else in it changes."""
    inputs = build(Case())
    arguments = (*new_tokens(inputs), *tensors(inputs))
    ours = [x.clone() for x in arguments]
    compiled = torch.compile(step, fullgraph=True, backend=backend)

    torch.testing.assert_close(compiled(*ours), step(*arguments))
    for mine, theirs in zip(ours, arguments, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_inductor_writes_into_the_pool_in_place():
    """A pool is not copied: no tensor as large as it is made."""
    inputs = build(replace(Case(), lens=(5, 9)))
    small = (*new_tokens(inputs), *tensors(inputs))
    pool = torch.zeros(4096, 16, 2, 64)  # 32 MiB
    arguments = [pool if x is inputs.key_cache else pool.clone() if x is inputs.value_cache else x for x in small]
    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    compiled(*arguments)
    with torch.profiler.profile(profile_memory=True) as profile:
        compiled(*arguments)
    assert max(event.cpu_memory_usage for event in profile.events()) < pool.nbytes / 2


def test_export():
    """An exported program holds the operator and runs on another pool of the same shape."""

    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return paged_attention(*tensors, scale=0.125, window=20)

    inputs = build(Case())
    program = torch.export.export(Attend(), tensors(inputs))

    assert names_of(program.graph_module) == ["paged_cache.attention.default"]
    other = [x if x.dtype is torch.int32 else x * 3 for x in tensors(inputs)]
    assert torch.equal(program.module()(*other), Attend()(*other))


def test_a_gradient_goes_through_the_reference():
    """Where one is asked for, a traced call is plain torch and can be differentiated."""
    inputs, backend = build(Case()), CompileCounterWithBackend("aot_eager")
    gradients = []
    for attend in (torch.compile(layer, fullgraph=True, backend=backend), layer):
        query = inputs.query.clone().requires_grad_()
        attend(query, *tensors(inputs)[1:], inputs.options).sum().backward()
        gradients.append(query.grad)

    torch.testing.assert_close(*gradients)
    assert names_of(backend.graphs[0]) == []
    assert gradients[0].abs().sum() > 0


def test_not_traced_no_operator(monkeypatch):
    """Without a compiler nothing goes through torch's dispatcher."""
    inputs = build(Case())
    monkeypatch.setattr(ops, "attention", None)
    expected = inputs.run(reference.paged_attention)
    torch.testing.assert_close(inputs.run(paged_attention), expected, rtol=1e-4, atol=1e-4)
