"""What no kernel may be given: a clear error names it, on every path, before anything is read or written."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import copy_blocks, paged_attention, reference, write_kv
from paged_cache.kernels.quantized import LARGEST
from tests.kernels.cases import Case, Inputs, build

PATHS = ["reference"] + ["cpu"] * (importlib.util.find_spec("numba") is not None)


def changed(inputs: Inputs, change: dict) -> Inputs:
    """The inputs with some tensors or options replaced by functions of them."""
    own = {name: f(getattr(inputs, name)) for name, f in change.items() if hasattr(inputs, name)}
    return replace(inputs, **own, extras=inputs.extras | {name: x for name, x in change.items() if name not in own})


WRONG = {
    "window is 0": {"window": 0},
    "window is -3": {"window": -3},
    "chunk is 0": {"chunk": 0},
    "softcap is -5.0": {"softcap": -5.0},
    r"block_table is \(2, 11\)": {"block_table": lambda x: x[:2]},
    r"block_table is \(4, 11, 2\)": {"block_table": lambda x: x[..., None].expand(-1, -1, 2)},
    r"seq_lens is \(4, 1\)": {"seq_lens": lambda x: x[:, None]},
    r"query is \(4, 8, 64\)": {"query": lambda x: x[:, :, 0]},
    "does not fit 3 sequence lengths": {"seq_lens": lambda x: x[:3]},
    "not a multiple of 0 KV heads": {"key_cache": lambda x: x[:, :, :0], "value_cache": lambda x: x[:, :, :0]},
    "float32 has no key_scales": {"key_scales": torch.ones(1)},
    "int8 needs key_scales": {"key_cache": lambda x: x.nan_to_num().to(torch.int8)},
    r"sinks is \(3,\)": {"sinks": torch.zeros(3)},
    "position_bias is": {"position_bias": torch.zeros(4, 8, 2, 130)},
    "on one device": {"block_table": lambda x: x.to("meta")},
    "cu_seqlens_q and max_q_len, both": {"cu_seqlens_q": torch.zeros(5, dtype=torch.int32)},
}
CONTENTS = {
    "names blocks .* to 1000000; there are": {"block_table": lambda x: x.masked_fill(x == 0, 1000000)},
    "names blocks -7 to": {"block_table": lambda x: x.masked_fill(x == 0, -7)},
    "rise from 0 to 8": {"cu_seqlens_q": torch.tensor([0, 3, 10, 9, 8], dtype=torch.int32), "max_q_len": 7},
    "has to rise": {"cu_seqlens_q": torch.tensor([0, 3, 4, 5, 800], dtype=torch.int32), "max_q_len": 795},
    "max_q_len is 1; a row has 4 new tokens": {"max_q_len": 1},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("message", WRONG)
def test_arguments_that_do_not_fit(message: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and value, whichever kernel would run."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", path)
    with pytest.raises(InvalidRequestError, match=message):
        changed(build(Case()), WRONG[message]).run(paged_attention)


@pytest.mark.skipif("cpu" not in PATHS, reason="the CPU kernel needs numba")
@pytest.mark.parametrize("message", CONTENTS)
def test_contents_that_lead_out_of_the_pool(message: str) -> None:
    """The compiled kernel would read or write foreign memory."""
    case = Case(lens=(37, 5, 130, 9), q_lens=(4, 1, 2, 1)) if "q_len" in str(CONTENTS[message]) else Case()
    with pytest.raises(InvalidRequestError, match=message):
        changed(build(case), CONTENTS[message]).run(paged_attention)


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_of_minus_infinity_hides_a_key(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also whole tiles of keys, and all keys of a query, which then yields zeros."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", path)
    inputs = build(Case(lens=(250, 250), bias=2))
    bias = inputs.extras["position_bias"]
    bias[0, ..., :130], bias[1] = float("-inf"), float("-inf")
    out = inputs.run(paged_attention)
    expected = replace(
        inputs, extras={"kv_starts": torch.tensor([130, 250]), "position_bias": bias.nan_to_num(neginf=0)}
    )
    torch.testing.assert_close(out, expected.run(reference.paged_attention), rtol=1e-5, atol=1e-5)
    assert not out[1].any()
    assert out[0].any()


@pytest.mark.parametrize("q_len", [3, 40])
@pytest.mark.parametrize("path", PATHS)
def test_a_query_with_hidden_keys_sees_no_later_ones(path: str, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token sees only itself, and not even that: zeros, whatever comes behind it."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", path)
    inputs = build(Case(lens=(q_len, 60), q_len=q_len, bias=2))
    inputs.extras["position_bias"][..., 0] = float("-inf")
    out = inputs.run(paged_attention)
    torch.testing.assert_close(out, inputs.run(reference.paged_attention), rtol=1e-5, atol=1e-5)
    assert not out[0, 0].any()
    assert out[0, 1].any()


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "position_bias"])
def test_gradients_reach_all_that_is_learnt(name: str) -> None:
    """No fast kernel has a backward pass: the reference takes the call."""
    inputs = build(Case(lens=(37, 5), sinks=True, alibi=True, bias=1))
    inputs.extras[name].requires_grad_()
    inputs.run(paged_attention).sum().backward()
    assert inputs.extras[name].grad.any()


def pool(kv_dtype: torch.dtype = torch.int8) -> dict:
    """Arguments of `write_kv` that are right."""
    scales = {f"{name}_scales": torch.zeros(4, 16, 2) for name in ("key", "value")} if kv_dtype in LARGEST else {}
    caches = {f"{name}_cache": torch.zeros(4, 16, 2, 64).to(kv_dtype) for name in ("key", "value")}
    new = {"keys": torch.randn(3, 2, 64), "values": torch.randn(3, 2, 64), "slot_mapping": torch.tensor([0, 17, 63])}
    return new | caches | scales


WRONG_WRITES = {
    "slot_mapping is torch.int32": {"slot_mapping": torch.tensor([0, 17, 63], dtype=torch.int32)},
    "do not fit 2 slots": {"slot_mapping": torch.tensor([0, 17])},
    "slot 64 is beyond the 64 slots": {"slot_mapping": torch.tensor([0, 64, 1])},
    "needs value_scales": {"value_scales": None},
    r"key_scales is torch.float32 \(2, 16, 2\)": {"key_scales": torch.zeros(2, 16, 2)},
    "value_scales is torch.bfloat16": {"value_scales": torch.zeros(4, 16, 2).bfloat16()},
    "has stride 2, not 1": {"key_cache": torch.zeros(4, 16, 2, 128, dtype=torch.int8)[..., ::2]},
    "on one device": {"slot_mapping": torch.tensor([0, 17, 63], device="meta")},
    "has no key_scales": {"key_cache": torch.zeros(4, 16, 2, 64)},
}


@pytest.mark.skipif("cpu" not in PATHS, reason="the CPU kernel needs numba")
@pytest.mark.parametrize("message", WRONG_WRITES)
def test_writes_that_do_not_fit(message: str) -> None:
    """Nothing is written."""
    arguments = pool() | WRONG_WRITES[message]
    with pytest.raises(InvalidRequestError, match=message):
        write_kv(**arguments)
    assert not arguments["value_cache"].any()


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_a_cache_holds_no_graph(kv_dtype: torch.dtype) -> None:
    """New K and V that require a gradient are stored as constants."""
    arguments = pool(kv_dtype)
    arguments["keys"].requires_grad_()
    write_kv(**arguments)
    assert not arguments["key_cache"].requires_grad
    assert arguments["key_cache"].float().any()


def test_nothing_to_copy() -> None:
    """No slabs, or no pairs, is no error."""
    slab = torch.ones(3, 4)
    copy_blocks([], [], torch.zeros(0, 2, dtype=torch.int64))
    copy_blocks([slab], [slab], torch.zeros(0, 2, dtype=torch.int64))
    assert slab.all()
