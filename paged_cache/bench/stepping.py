"""Decode steps: models that share their weights, each with a cache of another kind that holds the same tokens."""

import copy
import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from .. import BlockPool, PagedCache, patch
from ..forward import begin_forward
from . import models
from .clocks import clock_of

PAGED, DYNAMIC, STATIC, COMPILED = "paged", "dynamic", "static", "static, compiled"
LAYERS = "layers"
ATTENTION_ONLY: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 16,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
BLOCK_SIZES = {"cpu": 16, "cuda": 64}
GROWTH = 32  # tokens that a cache grows beyond the context before it is cropped


def make_model(name: str, device: str, dtype: str, seed: int) -> Any:
    """`LAYERS`: next to nothing but attention. Others: see `models.make_model`."""
    torch_dtype = getattr(torch, dtype)
    if name != LAYERS:
        return models.make_model(name, device, torch_dtype, seed)
    torch.manual_seed(seed)
    config = LlamaConfig(**ATTENTION_ONLY, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).to(device, torch_dtype).eval()  # type: ignore[arg-type]


class Stepper:
    """A model, a cache, and the times of its steps. The model is called as `generate` calls it: with positions and a mask.

    Attributes:
        length: Tokens in the cache, per row.
        steps, layers: Seconds, one number per step. Of layers there are none where a graph hides them.
    """

    def __init__(self, name: str, model: Any, cache: Any, batch_size: int, length: int, forward: Any = None) -> None:
        self.name, self.cache, self.batch_size, self.length = name, cache, batch_size, length
        self.device = str(model.device)
        self.steps, self.layers = list[float](), list[float]()
        self._forward, self._clock = forward or model, clock_of(self.device)
        self._is_compiled = forward is not None
        self._marks: list[Any] = []
        self._update = cache.update
        if forward is None:
            self._watch_layers(model)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One token per row, timed: outputs of all rows."""
        inputs = self._inputs(ids)
        self._marks.clear()
        self._clock.wait()
        start = time.perf_counter()
        output = self._forward(**inputs, past_key_values=self.cache, use_cache=True).logits
        self._clock.wait()
        self.steps.append(time.perf_counter() - start)
        self.length += 1
        if self._marks:
            pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
            self.layers.append(sum(self._clock.seconds(*pair) for pair in pairs) / len(pairs))
        return torch.as_tensor(output).clone()

    def crop(self, num_tokens: int) -> None:
        """Removes the last tokens."""
        self.length -= num_tokens
        if not isinstance(self.cache, StaticCache):
            self.cache.crop(-num_tokens)
            return
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.sub_(num_tokens)

    def _inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of the next step. A graph gets no mask, whose shape would change with each step."""
        if self._is_compiled:
            return {"input_ids": ids}
        mask = ids.new_ones(self.batch_size, self.length + 1)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.full_like(ids, self.length)}

    def _watch_layers(self, model: Any) -> None:
        self.cache.update = self._timed_update
        for name, module in model.named_modules():
            if name.endswith("self_attn.o_proj"):
                module.register_forward_pre_hook(self._stop)

    def _timed_update(self, *args: Any, **kwargs: Any) -> Any:
        self._marks.append(self._clock.mark())
        return self._update(*args, **kwargs)

    def _stop(self, *_: Any) -> None:
        self._marks.append(self._clock.mark())


def make_steppers(model: Any, batch_size: int, context: int, compiles: bool = True) -> list[Stepper]:
    """The reference first, then ours and the other peers; all caches hold the same random tokens.

    Ours knows their ids, as after a prompt of `generate`: each step adds its tokens to the prefix index.
    """
    config, length = model.config, context + GROWTH
    paged = with_same_weights(model)
    patch(paged)
    cache = PagedCache(shuffled_pool(paged, batch_size, length))
    pairs: list[tuple[str, Any, Any]] = [
        (DYNAMIC, with_same_weights(model), DynamicCache(config=config)),
        (PAGED, paged, cache),
        (STATIC, with_same_weights(model), StaticCache(config=config, max_cache_len=length)),
    ]
    if compiles and model.device.type == "cuda":
        pairs.append((COMPILED, with_same_weights(model), StaticCache(config=config, max_cache_len=length)))
    ids = torch.randint(config.vocab_size, (batch_size, context), device=model.device)
    begin_forward(paged, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, lazy=True)
    _fill([cache for *_, cache in pairs], model, batch_size, context)
    cache._state.finish()
    return [
        Stepper(name, own, cache, batch_size, context, _compiled(own) if name == COMPILED else None)
        for name, own, cache in pairs
    ]


def with_same_weights(model: Any) -> Any:
    """Modules of its own, the same parameters."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def shuffled_pool(model: Any, batch_size: int, num_tokens: int) -> BlockPool:
    """A pool for so many rows whose free blocks are in random order, as after some time of use."""
    block_size = BLOCK_SIZES.get(model.device.type, 16)
    num_blocks = batch_size * -(-num_tokens // block_size)
    pool = BlockPool.for_model(model, num_blocks=num_blocks, block_size=block_size)
    with PagedCache(pool) as cache:
        for layer in range(model.config.num_hidden_layers):
            cache.update(*_random(model, num_blocks, 1), layer)
        cache.batch_select_indices(torch.randperm(num_blocks, device=model.device))
    return pool


def _compiled(model: Any) -> Any:
    return torch.compile(model.forward, mode="reduce-overhead", dynamic=False)


def _fill(caches: list[Any], model: Any, batch_size: int, context: int) -> None:
    for layer in range(model.config.num_hidden_layers):
        keys, values = _random(model, batch_size, context)
        for cache in caches:
            cache.update(keys, values, layer)


def _random(model: Any, batch_size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    size = batch_size, config.num_key_value_heads, num_tokens, config.head_dim
    keys, values = (torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2))
    return keys, values
