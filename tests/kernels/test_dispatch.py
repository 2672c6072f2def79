"""Which kernel runs, and that somebody is told."""

import contextlib
import importlib
import importlib.util
import inspect
import logging
from unittest import mock

import pytest
import torch

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels import dispatch, paged_attention, reference
from tests.kernels.cases import Case, build

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the CPU kernel needs numba")


def run_and_count(inputs):
    """The names of the kernels that a call ran on."""
    kernels = [reference, dispatch._preferred(inputs.query.device)]
    with contextlib.ExitStack() as stack:
        mocks = {k.__name__: stack.enter_context(mock.patch.object(k, "paged_attention")) for k in kernels}
        inputs.run(paged_attention)
    return [name.rpartition(".")[2] for name, called in mocks.items() if called.called]


@needs_numba
def test_cpu_tensors_go_to_the_compiled_kernel(caplog):
    """And one debug line says so, however many calls there are."""
    with caplog.at_level(logging.DEBUG, logger="paged_cache"):
        for _ in range(3):
            assert run_and_count(build(Case())) == ["cpu"]
    assert [record.getMessage() for record in caplog.records] == [
        "paged attention of queries (4, 8, 1, 64) torch.float32 over blocks of torch.float32 runs on kernel cpu"
    ]


def test_other_devices_go_to_the_reference():
    """There is no kernel for them."""
    assert dispatch._preferred(torch.device("meta")) is reference


@needs_numba
def test_a_call_that_the_kernel_does_not_take(caplog):
    """It goes to the reference, and a debug line gives the reason."""
    inputs = build(Case(dtype=torch.float64))
    with caplog.at_level(logging.DEBUG, logger="paged_cache"):
        for _ in range(2):
            assert run_and_count(inputs) == ["reference"]
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "kernel cpu does not take it: queries are torch.float64" in record.getMessage()


@needs_numba
def test_a_forced_kernel_that_does_not_take_a_call_warns_once(caplog, monkeypatch):
    """Whoever forces a kernel wants to know when it is not used."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", "cpu")
    inputs = build(Case(dtype=torch.float64))
    with caplog.at_level(logging.DEBUG, logger="paged_cache"):
        for _ in range(2):
            assert run_and_count(inputs) == ["reference"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_kernel_that_is_not_there_warns_once(caplog, monkeypatch):
    """Its library is not installed: the reference takes over."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", "cpu")
    inputs = build(Case())
    with (
        mock.patch.object(importlib, "import_module", side_effect=ImportError("no numba")),
        caplog.at_level(logging.WARNING, logger="paged_cache"),
    ):
        for _ in range(2):
            assert run_and_count(inputs) == ["reference"]
    (record,) = caplog.records
    assert "cpu kernel is not available (no numba)" in record.getMessage()


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_numba)])
def test_the_environment_forces_a_kernel(name, monkeypatch):
    """By its name."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", name)
    assert run_and_count(build(Case())) == [name]


def test_an_unknown_name_is_refused(monkeypatch):
    """With the names that there are."""
    monkeypatch.setenv("PAGED_CACHE_KERNEL", "cuda")
    with pytest.raises(InvalidRequestError, match=r"'cuda'.*reference, triton, cpu"):
        build(Case()).run(paged_attention)


@pytest.mark.parametrize("name", ["dispatch", *dispatch.KERNELS])
def test_all_kernels_have_one_signature(name):
    """So that a kernel can stand in for any other, and a test is a one-word swap."""
    pytest.importorskip({"cpu": "numba", "triton": "triton"}.get(name, "torch"))
    kernel = importlib.import_module(f"paged_cache.kernels.{name}").paged_attention
    parameters = inspect.signature(kernel).parameters
    assert list(parameters.items()) == list(inspect.signature(reference.paged_attention).parameters.items())
