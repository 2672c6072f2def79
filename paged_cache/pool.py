"""The pool of blocks that all caches of a model draw from."""

import inspect
import weakref
from collections.abc import Hashable

import torch
from transformers import PreTrainedModel

from .compat import base_model, logger, uses_attention_interface
from .devices import input_device, layer_devices
from .errors import InvalidRequestError, UnsupportedModelError
from .memory.host_storage import attach
from .memory.layout import LayerSpec, PoolLayout, plan_layout
from .memory.manager import BlockManager
from .memory.storage import KVStorage, itemsizes
from .model_spec import ModelSpec, model_spec
from .pool_stats import PoolStats
from .saved_prefixes import SavesPrefixes
from .sizes import (
    check_block_size,
    check_dtypes,
    num_blocks_for,
    num_host_blocks_for,
    require_room,
)
from .weights import WeightsVersion
from .wording import format_bytes


class BlockPool(SavesPrefixes):
    """All blocks of one model. Make it with `for_model`; any number of caches (`PagedCache`) may draw from it.

    Attributes:
        has_attention_interface: Whether the model's attention goes through transformers' registry; attention that is
            written out may rely on contiguous K and V.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: PoolLayout,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        prefix_caching: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        self.spec = spec
        self.storage = KVStorage(layout, num_blocks, block_size, dtype, device, kv_dtype)
        self.manager = BlockManager(num_blocks, block_size, layout.windows, prefix_caching, num_host_blocks)
        self.manager.on_copy = self._copy_blocks
        self.host_storage = attach(self.manager.host, self.storage) if num_host_blocks else None
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._weights: WeightsVersion | None = None
        self._confirmed: set[int] = set()
        self.has_attention_interface = True

    @classmethod
    def for_model(
        cls,
        model: torch.nn.Module,
        *,
        num_blocks: int | None = None,
        memory: int | float | str | None = None,
        block_size: int = 16,
        dtype: torch.dtype | None = None,
        kv_dtype: str | torch.dtype | None = None,
        prefix_caching: bool = True,
        offload_memory: int | float | str | None = None,
    ) -> "BlockPool":
        """A pool that fits the K and V of `model`, each layer's on the device where the layer computes.

        Args:
            model: A `PreTrainedModel` with a text decoder, or a `PeftModel` around one.
            num_blocks: Blocks in the pool. Exactly one of `num_blocks` and `memory` is given.
            memory: Bytes for K and V on all devices: an int, a string such as "2GiB" or "500MB", or a float, the share
                of the memory that is free now on each.
            block_size: Tokens per block, a power of two.
            dtype: In which K and V come back; the model's by default.
            kv_dtype: In which they are stored: "int8" or "fp8_e4m3" take half the memory of 16 bits, at some loss of
                precision (docs/quantized_kv.md); "auto", the default, is `dtype`.
            prefix_caching: Whether blocks of a prompt stay findable for later prompts that start alike.
            offload_memory: Bytes of host memory, as `memory`, for blocks that would be evicted (docs/kv_offload.md).

        Raises:
            InvalidRequestError: An argument is wrong, or asks for more memory than there is.
            UnsupportedModelError: The model has no text decoder that transformers' caches know.
        """
        inner = base_model(model)
        if not isinstance(inner, PreTrainedModel):
            raise UnsupportedModelError(
                f"{type(model).__name__} is no transformers model: pass a PreTrainedModel or a PeftModel around one."
            )
        check_block_size(block_size)
        dtype, kv_dtype = check_dtypes(dtype, kv_dtype, inner.dtype)
        spec = model_spec(inner.config)
        devices = layer_devices(inner, spec.layers)
        layout = plan_layout(spec.layers, devices)
        per_token = layout.entry_bytes_by_device(*itemsizes(kv_dtype)) or {input_device(inner): 0}
        per_block = {device: n * block_size for device, n in per_token.items()}
        count = num_blocks_for(num_blocks, memory, per_block)
        host_count = num_host_blocks_for(offload_memory, per_block, prefix_caching)
        require_room(per_block, count, host_count)
        pool = cls(
            spec,
            layout,
            num_blocks=count,
            block_size=block_size,
            dtype=dtype,
            device=next(iter(devices.values()), input_device(inner)),
            kv_dtype=kv_dtype,
            prefix_caching=prefix_caching,
            num_host_blocks=host_count,
        )
        pool.has_attention_interface = uses_attention_interface(inner, spec.config)
        pool._model, pool._weights = weakref.ref(inner), WeightsVersion(inner)
        logger.info("BlockPool for %s: %s", type(inner).__name__, pool.describe())
        return pool

    def for_trials(self, num_blocks: int) -> "BlockPool":
        """A pool of its own for the same model, which stores K and V as they are and no prefixes."""
        layout, size, dtype, device = self.storage.layout, self.block_size, self.dtype, self.storage.device
        pool = BlockPool(
            self.spec, layout, num_blocks=num_blocks, block_size=size, dtype=dtype, device=device, prefix_caching=False
        )
        pool.has_attention_interface, pool._model = self.has_attention_interface, self._model
        return pool

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.manager.allocator.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.manager.block_size

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached ones included."""
        return self.manager.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody references but that still hold a reusable prefix."""
        return self.manager.num_cached

    @property
    def dtype(self) -> torch.dtype:
        """In which K and V come back, whatever they are stored in."""
        return self.storage.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """In which K and V are stored."""
        return self.storage.kv_dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks of the first layer with K and V are."""
        return self.storage.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that have blocks, in the order of the layers, each once."""
        return self.storage.devices

    @property
    def nbytes(self) -> int:
        """Bytes of K and V that the pool holds, scales included."""
        return self.storage.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, scales included."""
        return self.storage.layout.bytes_per_token(*itemsizes(self.kv_dtype))

    @property
    def num_tokens(self) -> int:
        """Tokens that fit when every layer keeps all of them; more with sliding windows."""
        return self.num_blocks // max(len(self.storage.layout.windows), 1) * self.block_size

    def stats(self) -> PoolStats:
        """Counters since the pool was made, and the states of its blocks."""
        return PoolStats.of(self.manager, self.nbytes)

    def check(self) -> None:
        """Raises `PagedCacheError` if any invariant of the bookkeeping is broken. Takes time: for tests."""
        self.manager.check()

    def clear_prefix_cache(self) -> None:
        """Forgets all prefixes, so that cached blocks become free."""
        self.manager.clear_prefix_cache()

    def invalidate(self) -> None:
        """Call it after weights were written through `.data`, which torch does not count: no earlier prefix is reused."""
        if self._weights is not None:
            self._weights.invalidate()
        self.clear_prefix_cache()

    def light_key(self) -> Hashable:
        """The part of `root_key` that can change and change back between two tokens."""
        return self._weights.light_key() if self._weights is not None else None

    @property
    def weights(self) -> WeightsVersion | None:
        """Says in what state the model's weights are; None for a pool without a model."""
        return self._weights

    def root_key(self, cache_salt: Hashable, extra: Hashable, adapter_name: str | None = None) -> Hashable | None:
        """All that K and V depend on besides the tokens; None if nothing may be shared now.

        Args:
            cache_salt: Of the caller.
            extra: Whatever else there is.
            adapter_name: "__base__" for the model without adapters, None for those that are active.
        """
        key = self._weights.key(adapter_name) if self._weights is not None and self.manager.prefix_caching else None
        return None if key is None else (key, cache_salt, extra)

    def belongs_to(self, model: torch.nn.Module) -> bool:
        """Whether the pool was made for this model (or for one that is gone)."""
        mine = self._model() if self._model is not None else None
        return mine is None or mine is base_model(model)

    @property
    def numbers_tokens(self) -> bool:
        """Whether the model is told each token's position; otherwise it counts columns, padding included."""
        model = self._model() if self._model is not None else None
        return model is None or "position_ids" in inspect.signature(model.forward).parameters

    @property
    def is_compileable(self) -> bool:
        """Raises, and says what to pass; `generate` asks for it when the pool itself is `past_key_values`.

        Raises:
            InvalidRequestError: Always.
        """
        raise InvalidRequestError("a BlockPool is no cache: pass past_key_values=PagedCache(pool).")

    def _copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self.storage.copy_blocks(pairs)  # looked up now: the pool may have been laid out again

    def describe(self) -> str:
        """One line: blocks, tokens, memory, bytes per token."""
        groups = len(self.storage.layout.windows)
        return (
            f"{self.num_blocks} blocks of {self.block_size} tokens, {format_bytes(self.nbytes)} of {self.kv_dtype} on "
            f"{', '.join(map(str, self.devices))}, {self.bytes_per_token} bytes per token, room for {self.num_tokens} tokens"
            + (f" ({groups} layer groups; windows return blocks)" if groups > 1 else "")
        )

    def check_layer(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compares a layer's first K and V, `[batch, heads, tokens, dim]`, with the pool.

        It follows other shapes but no other dtype or device.
        """
        for name, x in (("keys", keys), ("values", values)):
            if torch.promote_types(x.dtype, self.dtype) != self.dtype:
                raise InvalidRequestError(
                    f"layer {layer} gives {name} of {x.dtype}, the pool holds {self.dtype} and would lose precision: "
                    f"BlockPool.for_model(model, ..., dtype={torch.promote_types(x.dtype, self.dtype)})."
                )
            if layer in self.storage.layers and x.device != self.storage.device_of(layer):
                raise InvalidRequestError(
                    f"layer {layer} gives {name} on {x.device}, its blocks in the pool are on "
                    f"{self.storage.device_of(layer)}: make the pool after the model was moved or dispatched."
                )
        window = self.spec.layers[layer].window if layer in self.spec.layers else None
        self.confirm(layer, LayerSpec(window, keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]))

    def confirm(self, layer: int, spec: LayerSpec) -> None:
        """Takes the shapes that a model really gives for a layer: the pool follows the first model that uses it.

        Raises:
            InvalidRequestError: The layer was used with other shapes before.
            UnsupportedModelError: The model's config has no such layer.
        """
        layout = self.storage.layout
        if layer not in layout.specs:
            raise UnsupportedModelError(f"layer {layer} gives keys; the pool was made for layers {list(layout.specs)}.")
        known = layout.specs[layer]
        if spec != known:
            if layer in self._confirmed:
                raise InvalidRequestError(
                    f"layer {layer} gives {spec}, the pool holds {known}: make a pool for this model with "
                    "BlockPool.for_model."
                )
            self.storage.relayout(layout.with_spec(layer, spec))
            self.manager.clear_prefix_cache()
            logger.info("layer %d has %s, not %s: %s", layer, spec, known, self.describe())
        self._confirmed.add(layer)

    def __repr__(self) -> str:
        return f"BlockPool({self.describe()})"
