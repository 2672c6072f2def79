"""From a config and an amount of memory to blocks, tokens and requests."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import InvalidRequestError, UnsupportedModelError
from ..loading import quiet
from ..memory.layout import plan_layout
from ..memory.storage import itemsizes
from ..memory.windows import Windows
from ..model_spec import ModelSpec, model_spec
from ..sizes import KV_DTYPES, check_block_size, check_dtypes, num_blocks_for
from .budget import available, given_weights, memory_and_reserve, source_of
from .configs import check_generates, dtype_of, max_positions, read_config
from .kinds import LayerKind, layer_kinds
from .notes import notes_on
from .requests import ContextLine, Lengths, Room, Way, contexts_up_to
from .states import Probe, States, has_states, probe
from .traces import usual_requests
from .weights import Weights, meta_model, require_generator, weights_of

UNKNOWN_CONTEXT = 4096


@dataclass(frozen=True)
class Plan:
    """What fits into an amount of memory. Sizes are bytes.

    Attributes:
        model_type: As the config calls it.
        memory: All there is.
        memory_source: Whose it is, in words; empty if it was given in bytes.
        dtype: In which the model computes.
        dtype_source: Who says so, in words.
        kv_dtype: In which K and V are stored in blocks.
        weights: The model's.
        overhead: Kept free for activations and the like.
        available: What is left for K, V and states.
        kinds: The layers with K and V.
        bytes_per_token: K and V of one token in all layers, scales included: `BlockPool.bytes_per_token`.
        states: What a sequence takes besides blocks; None where it cannot be told from the config.
        windows: Per layer group its window; layers of one group share block tables.
        block_size: Tokens per block.
        block_nbytes: Of one block of one layer group.
        num_blocks: Blocks of the pool.
        pool_memory: What `BlockPool.for_model(memory=…)` makes these blocks of.
        num_tokens: That fit into the blocks if every layer keeps all of them: `BlockPool.num_tokens`.
        context: Tokens that contiguous memory reserves for each row.
        lengths: The requests.
        contiguous, padded, paged: How many of them fit; in blocks, where prompts are read in chunks, as `ContinuousBatcher` does.
        one_pass: How many fit in blocks in one call of `generate`, which reads prompts whole: fewer if layers have windows.
        contexts: How many fit of each length.
        notes: What else is to be known, in sentences.
    """

    model_type: str
    memory: int
    memory_source: str
    dtype: torch.dtype
    dtype_source: str
    kv_dtype: torch.dtype
    weights: Weights
    overhead: int
    available: int
    kinds: tuple[LayerKind, ...]
    bytes_per_token: int
    states: States | None
    windows: tuple[int | None, ...]
    block_size: int
    block_nbytes: int
    num_blocks: int
    pool_memory: int
    num_tokens: int
    context: int
    lengths: Lengths
    contiguous: Way
    padded: Way
    paged: Way
    one_pass: Way
    contexts: tuple[ContextLine, ...]
    notes: tuple[str, ...]

    @property
    def formulas(self) -> tuple[str, ...]:
        """One for each kind of layer: the bytes of a token as a product."""
        return tuple(kind.formula for kind in self.kinds)

    @property
    def code(self) -> str:
        """The line that makes the pool."""
        options = [f"num_blocks={self.num_blocks}"]
        if self.block_size != 16:
            options.append(f"block_size={self.block_size}")
        if self.kv_dtype != self.dtype:
            options.append(f'kv_dtype="{_kv_name(self.kv_dtype)}"')
        return f"BlockPool.for_model(model, {', '.join(options)})"

    def to_dict(self) -> dict[str, Any]:
        """Numbers and words only, as for JSON."""
        values = asdict(self)
        values.update(
            dtype=_name(self.dtype), kv_dtype=_name(self.kv_dtype), formulas=list(self.formulas), code=self.code
        )
        return values


def plan(
    model: str | Path | PreTrainedConfig,
    *,
    memory: int | float | str | None = None,
    dtype: str | torch.dtype | None = None,
    kv_dtype: str | torch.dtype | None = None,
    block_size: int = 16,
    weights_memory: int | str | None = None,
    with_weights: bool = True,
    overhead: float = 0.1,
    context: int | None = None,
    prompt_len: int | None = None,
    output_len: int | None = None,
    requests: Sequence[tuple[int, int]] | None = None,
    shared_prefix_len: int = 0,
    num_beams: int = 1,
) -> Plan:
    """What fits, without loading the model: its config is all that is read.

    Args:
        model: A hub id, a folder, a `config.json`, or a config.
        memory: For everything: bytes, a string such as "24GiB", or a float, the share of what is free here. All of that by
            default, on the GPU if there is one.
        dtype: In which the model is loaded: "float16", "bfloat16", "float32", or "auto" (None), the config's.
        kv_dtype: As `BlockPool.for_model` takes it.
        block_size: Tokens per block.
        weights_memory: What the weights take, instead of what is computed from the config.
        with_weights: False if they are elsewhere, or if `memory` is without them.
        overhead: Share of `memory` that is kept for activations and the like.
        context: Tokens that contiguous memory reserves for each row; as many as the model is made for by default.
        prompt_len, output_len: Tokens of each request; 512 and 128 for the one that is not given.
        requests: Prompt and output tokens of several, instead of those two. Without any of these, the lengths of the trace in
            the package, divided so that they fit the context.
        shared_prefix_len: Tokens that all prompts start with, before those of `prompt_len` or `requests`.
        num_beams: Rows of a request.

    Raises:
        InvalidRequestError: An argument is wrong, or the memory is too small.
        UnsupportedModelError: The model has no K and V, or does not generate text.
    """
    with quiet():
        config = read_config(model)
    check_block_size(block_size)
    model_dtype, dtype_source = dtype_of(config, dtype)
    model_dtype, stored = check_dtypes(None, kv_dtype, model_dtype)
    total, reserve = memory_and_reserve(memory, overhead)
    spec = _spec(config)
    weights, probed = _model(config, spec, model_dtype, given_weights(weights_memory, with_weights))
    states = probed.states if probed is not None else None if has_states(spec) else States()
    left = available(total, reserve, weights)
    layout = plan_layout(spec.layers)
    block_nbytes = layout.entry_bytes_per_token(*itemsizes(stored)) * block_size
    limit = max_positions(spec.config)
    lengths, context = _lengths(
        (limit or UNKNOWN_CONTEXT) if context is None else context,
        prompt_len,
        output_len,
        requests,
        shared_prefix_len,
        num_beams,
    )
    kinds = layer_kinds(spec, *itemsizes(stored))
    windows = Windows(layout.windows, block_size)
    room = Room(
        left, context, windows, block_size, block_nbytes, kinds, model_dtype.itemsize, states or States(), spec.is_prefix_exact
    )  # fmt: skip
    paged = room.paged(lengths)
    pool_memory = left - _outside(paged, room, lengths)
    num_blocks = num_blocks_for(None, pool_memory, {torch.device("cpu"): block_nbytes})
    return Plan(
        model_type=config.model_type, memory=total, memory_source=source_of(memory), overhead=reserve, available=left,
        dtype=model_dtype, dtype_source=dtype_source, kv_dtype=stored, weights=weights, states=states, kinds=kinds,
        bytes_per_token=layout.bytes_per_token(*itemsizes(stored)), windows=layout.windows,
        block_size=block_size, block_nbytes=block_nbytes, num_blocks=num_blocks, pool_memory=pool_memory,
        num_tokens=num_blocks // len(layout.windows) * block_size, context=context, lengths=lengths,
        contiguous=room.contiguous(lengths), padded=room.padded(lengths), paged=paged, one_pass=room.one_pass(lengths),
        contexts=room.lines(contexts_up_to(context)),
        notes=notes_on(config, spec, layout, probed, states, limit, context, lengths),
    )  # fmt: skip


def _spec(config: PreTrainedConfig) -> ModelSpec:
    """The layers of a model that generates text and has K and V."""
    require_generator(config)
    check_generates(config)
    try:
        spec = model_spec(config)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the config of {config.model_type!r} does not tell its layers: {error}."
        ) from error
    if not spec.layers:
        raise UnsupportedModelError(
            f"{config.model_type!r} keeps no K and V, only a state of a fixed size for each sequence: there is nothing to plan in "
            "blocks. Plan for a model with attention."
        )
    return spec


def _model(
    config: PreTrainedConfig, spec: ModelSpec, dtype: torch.dtype, given: tuple[int, str] | None
) -> tuple[Weights, Probe | None]:
    """Weights, and what a forward leaves in a cache, from the model on the meta device."""
    try:
        with quiet():
            model = meta_model(config, dtype)
            probed = probe(model, spec)
    except UnsupportedModelError as error:
        if given is None:
            raise UnsupportedModelError(f"{error} Without it weights cannot be counted: say weights_memory.") from error
        return Weights(None, *given), None
    weights = weights_of(model, config, dtype)
    return weights if given is None else replace(weights, nbytes=given[0], note=given[1]), probed


def _lengths(
    context: int, prompt_len: int | None, output_len: int | None, requests: Any, shared_prefix_len: int, num_beams: int
) -> tuple[Lengths, int]:
    """The requests, checked against the context."""
    given = {"context": context, "prompt_len": prompt_len, "output_len": output_len, "num_beams": num_beams}
    for name, value in given.items():
        if value is not None and value < 1:
            raise InvalidRequestError(f"{name} is {value}; it has to be at least 1.")
    if shared_prefix_len < 0:
        raise InvalidRequestError(f"shared_prefix_len is {shared_prefix_len}; it has to be at least 0.")
    if requests is not None and (prompt_len is not None or output_len is not None):
        raise InvalidRequestError(
            "requests have lengths of their own: leave out prompt_len and output_len, or the requests."
        )
    source = ""
    if requests is None and prompt_len is None and output_len is None:
        requests, source = usual_requests(context - shared_prefix_len)
    elif requests is None:
        requests = [(prompt_len or max(1, min(512, context // 2)), output_len or max(1, min(128, context // 4)))]
    if not requests or any(prompt < 1 or output < 1 for prompt, output in requests):
        raise InvalidRequestError(f"requests are {requests!r}; each has at least one token of prompt and of output.")
    longest = shared_prefix_len + max(prompt + output for prompt, output in requests)
    if longest > context:
        raise InvalidRequestError(
            f"the longest request has {longest} tokens, the context is {context}: give a longer context or shorter requests."
        )
    return Lengths(
        tuple((prompt, output) for prompt, output in requests), shared_prefix_len, num_beams, source
    ), context


def _outside(paged: Way, room: Room, lengths: Lengths) -> int:
    """Bytes of the states of all requests that fit."""
    tokens = sum(lengths.mean) - 1
    per_row = room.states.nbytes + tokens * room.states.bytes_per_token
    return int(paged.num_requests * lengths.num_beams * per_row)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kv_name(dtype: torch.dtype) -> str:
    return next((name for name, each in KV_DTYPES.items() if each is dtype), _name(dtype))
