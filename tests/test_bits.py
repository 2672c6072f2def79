"""Sums that tell whether tensors changed."""

import pytest
import torch

from paged_cache.bits import samples, sums

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (5, 7), (600, 1000), ()], ids=str)
def test_any_changed_element_shows(dtype, shape):
    """One element more or less in any place gives another sum; putting it back gives the old one."""
    x = torch.zeros(shape).to(dtype)
    before, flat = sums([x, torch.ones(3).to(dtype)]), x.view(-1)
    for place in (0, flat.numel() // 2, flat.numel() - 1):
        flat[place] = 1
        assert sums([x, torch.ones(3).to(dtype)]) != before
        flat[place] = 0
    assert sums([x, torch.ones(3).to(dtype)]) == before


def test_changes_do_not_cancel():
    """Neighbours that change places, here and there in opposite directions, or words that move, show as well."""
    x = torch.arange(64, dtype=torch.float32)
    seen = {sums([x])}
    for i, j in ((0, 1), (10, 11), (0, 63)):
        y = x.clone()
        y[[i, j]] = y[[j, i]]
        seen.add(sums([y]))
        y[[63 - i, 63 - j]] = y[[63 - j, 63 - i]]
        seen.add(sums([y]))
    assert len(seen) == 6  # the last pair is put back
    assert sums([x[1:], x[:1]]) != sums([x])


def test_layout_does_not_matter():
    """A view, a transposed tensor and a copy of the same content have the same sum."""
    x = torch.randn(40, 30)
    assert sums([x.t().contiguous()]) == sums([x.t()])
    assert sums([torch.cat([torch.zeros(7), x.reshape(-1)])[7:]]) == sums([x])


def test_samples_see_what_changes_everywhere():
    """A change of almost all elements shows in the sample of any tensor, large or small; tensors without data do not count."""
    tensors = [torch.randn(1000, 300), torch.randn(5), torch.randn(64, 10)[:, 3:], torch.empty(3, device="meta")]
    before = samples(tensors)
    assert samples(tensors) == before
    for x in tensors[:3]:
        x += 1e-3
        changed = samples(tensors)
        assert changed != before
        before = changed
    assert samples([torch.randn(500, 500)[100:].contiguous()]) != samples([torch.randn(400, 500)])


def test_wrappers_are_their_parts():
    """A tensor that is made of others, as quantised weights are, has the sums of those, and a change in one of them shows."""

    class Pair(torch.Tensor):
        """Codes and their scale."""

        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(function)

    codes, scale = torch.arange(100, dtype=torch.int8), torch.rand(5)
    before = sums([Pair(codes, scale)])
    assert before == sums([codes, scale])
    assert samples([Pair(codes, scale)]) == samples([codes, scale])
    scale[3] += 1
    assert sums([Pair(codes, scale)]) != before
