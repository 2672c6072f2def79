"""Draws from scores that are no distribution: only the request that made them fails, on a GPU as on a CPU."""

from types import SimpleNamespace

import pytest
import torch

from paged_cache.batching import choosing
from tests.batching.alone import alone, tiny
from tests.batching.faults import PROMPTS, batching, reasons, run

SIZES = [1, 3, 1, 2, 1, 1]
BAD = {
    "nan": torch.tensor([0.0, float("nan"), 1.0, 2.0]),
    "infinite": torch.tensor([0.0, float("inf"), 1.0, 2.0]),
    "nothing left": torch.full((4,), float("-inf")),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("row", [0, 2, 4, 8])
def test_what_cannot_be_drawn_from(kind, row):
    """Before a GPU draws, those requests are named of which the CPU would say that their rows are no probabilities."""
    scores = torch.randn(sum(SIZES), 4, generator=torch.Generator().manual_seed(1))
    scores[1, :3] = float("-inf")  # one token left: that is sound
    scores[row] = BAD[kind]
    probabilities = torch.nn.functional.softmax(scores, dim=-1)
    are_sound = choosing._are_sound(probabilities, SIZES)
    for part, is_sound in zip(probabilities.split(SIZES), are_sound, strict=True):
        generator = torch.Generator().manual_seed(2)
        choice = choosing._draw(SimpleNamespace(generator=generator), part, True)
        assert isinstance(choice, list) == is_sound
    assert are_sound.count(False) == 1


def test_only_the_request_with_broken_scores_fails(monkeypatch):
    """With the check that a GPU needs, requests that are drawn together end as without it."""
    options = {"do_sample": True, "max_new_tokens": 5, "eos_token_id": None, "top_k": 20}

    class Broken(torch.nn.Module):
        def forward(self, input_ids, scores):
            return torch.full_like(scores, float("-inf"))

    sample, draws = choosing._draw, []

    def draw(decoding, part, is_sound):
        (is_sound,) = choosing._are_sound(part, [len(part)])
        draws.append(is_sound)
        return sample(decoding, part, is_sound)

    monkeypatch.setattr(choosing, "_draw", draw)
    with batching() as batcher:
        handles = [
            batcher.submit(ids, **options, seed=seed, **({"logits_processor": [Broken()]} if seed == 1 else {}))
            for seed, ids in enumerate(PROMPTS[:3])
        ]
        outputs = run(batcher, handles)
    assert reasons(outputs) == ["length", "error", "length"]
    assert isinstance(outputs[1].error, RuntimeError)
    assert draws.count(False) == 1
    for seed in (0, 2):
        assert outputs[seed].sequences == alone(tiny("llama"), PROMPTS[seed], **options, seed=seed)
