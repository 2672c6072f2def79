"""Times of forwards: on a CPU those of the call, on a GPU those of the device, without a wait before they are read."""

from types import SimpleNamespace

import pytest
import torch

from paged_cache.batching.stopwatch import Stopwatch
from tests.observability.runs import Clock


class FakeEvent:
    """A moment on a device that is far behind; `waits` says who waited."""

    waits, count = [], 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.place, self.stream = FakeEvent.count, stream
        FakeEvent.count += 1

    def synchronize(self):
        FakeEvent.waits.append(self.place)

    def elapsed_time(self, other):
        assert FakeEvent.waits == [other.place], "asked before it is known"
        return 2500.0 * (other.place - self.place)


def test_on_a_cpu():
    """Seconds of the call, and the moments on the batcher's clock."""
    clock = Clock(tick=1.0)
    watch = Stopwatch(clock, [torch.device("cpu")])
    watch.stop(torch.zeros(1))
    seconds, end = watch.read()
    assert 0 <= seconds < 1
    assert (watch.begun, end) == (101.0, 102.0)
    assert watch.read() == (seconds, end)


def test_on_a_gpu(monkeypatch):
    """What the GPU took, which is waited for when it is asked for and not before."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(FakeEvent, "waits", [])
    watch = Stopwatch(lambda: 100.0, [torch.device("cuda", 0)])
    watch.stop(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)))
    assert not FakeEvent.waits
    assert watch.read() == (2.5, 102.5)
    assert len(FakeEvent.waits) == 1


def test_on_several_gpus(monkeypatch):
    """GPUs have no clock in common: the result is waited for."""
    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    watch = Stopwatch(lambda: 100.0, [torch.device("cuda", 0), torch.device("cuda", 1)])
    watch.stop(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1)))
    assert waits == [1]
    assert watch.read()[0] >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu():
    """A chain of products takes longer than handing it over does."""
    x = torch.randn(4096, 4096, device="cuda")
    (x @ x).sum().item()
    watch = Stopwatch(lambda: 100.0, [torch.device("cuda", 0)])
    for _ in range(50):
        y = x @ x
    watch.stop(y)
    assert watch.read()[0] > watch._seconds
