"""The Triton kernels as one function: what it takes, how it is launched."""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels.checks import check_shapes
from paged_cache.kernels.quantized import LARGEST, as_bytes

from . import config
from .config import Config
from .kernel import attend_kernel, merge_kernel
from .launch import CachedLaunch
from .plan import Shape

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

INTERPRETED = not isinstance(attend_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set at import: the kernels then run on CPU tensors."""


def supports(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, **options: Any) -> str | None:
    """Why `paged_attention` does not take a call with these tensors, or None if it does. All options are supported."""
    if reason := _device_problem(query.device):
        return reason
    if (
        query.dtype not in TL_DTYPES
        or key_cache.dtype != value_cache.dtype
        or key_cache.dtype not in {*TL_DTYPES, *LARGEST}
    ):
        return f"query is {query.dtype}, key cache {key_cache.dtype}, value cache {value_cache.dtype}"
    if not all(16 <= x.shape[-1] <= 256 for x in (key_cache, value_cache)):
        return f"head dimensions {key_cache.shape[-1]} and {value_cache.shape[-1]} are not within 16 .. 256"
    strides = [x.stride(-1) for x in (query, key_cache, value_cache)]
    if strides != [1, 1, 1]:
        return f"the last strides {strides} are not all 1"
    trained = (query, *(options.get(name) for name in ("sinks", "alibi_slopes", "position_bias")))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in trained):
        return "it has no backward pass, and an argument requires grad"
    return None


@functools.cache
def _device_problem(device: torch.device) -> str | None:
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
    max_q_len: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    memo: dict[Any, Any] | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens of each sequence, read through a block table.

    Arguments and result are those of `reference.paged_attention`, for the calls that `supports` accepts. Never waits for
    the device, and may be captured in a CUDA graph: tables and lengths are read when the graph runs. `memo` keeps what
    the layers of a step share, the work list and partial results among it; a graph has to be captured with a `memo` that is
    new or absent.

    Products are computed in the wider dtype of query and cache, those of 8-bit codes in float16; everything else in
    float32. With `PAGED_CACHE_BATCH_INVARIANT=1` in the environment, a row's result has the same bits in any batch.

    Raises:
        InvalidRequestError: Shapes do not fit each other, or `supports` gives a reason.
    """
    options: dict[str, Any] = {
        "window": window,
        "chunk": chunk,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    options |= {"position_bias": position_bias, "key_scales": key_scales, "value_scales": value_scales}
    lengths: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max_q_len, "kv_starts": kv_starts}
    varying = query, key_cache, value_cache, sinks, alibi_slopes, position_bias, key_scales, value_scales
    kind = None if memo is None else (window, chunk, torch.is_grad_enabled(), *map(_look, varying))
    shared = None if memo is None else memo.get(kind)
    if shared is None:
        check_shapes(query, key_cache, value_cache, block_table, seq_lens, **options, **lengths)
        if reason := supports(query, key_cache, value_cache, **options):
            raise InvalidRequestError(f"the Triton kernel does not take this call: {reason}")
        if query.numel() == 0:
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_cache.shape[3])
        shared = _prepare(query, key_cache, value_cache, block_table, seq_lens, **options, **lengths)
        if memo is not None:
            memo[kind] = shared
    return _launch(shared, *varying, scale=scale, softcap=softcap)


def _look(x: torch.Tensor | None) -> Any:
    """What of a tensor decides how it is treated."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)


class Shared(NamedTuple):
    """What calls of one kind share in a step; they run one after another, so they may use the same memory."""

    attend: CachedLaunch
    merge: CachedLaunch | None  # None if no tile can be split
    grid: tuple[int, int, int]
    out_shape: tuple[int, ...]
    parts: tuple[torch.Tensor | None, torch.Tensor | None]  # partial results and their denominators
    tables: tuple[torch.Tensor | None, ...]  # block table, lengths, work list, `cu_seqlens_q`, `kv_starts`
    sizes: tuple[int, ...]  # from the strides of `query` to its length
    limits: tuple[int | None, int | None]  # window, chunk


def _prepare(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int | None,
    kv_starts: torch.Tensor | None,
    window: int | None,
    chunk: int | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    **_: Any,
) -> Shared:
    """Plan the work of calls whose arguments are known to be right."""
    rows, num_heads, num_tokens, k_dim = query.shape
    block_size, num_kv_heads, v_dim = value_cache.shape[1:]
    group, q_len = num_heads // num_kv_heads, num_tokens if max_q_len is None else max_q_len
    capacity, fixed = block_table.shape[1] * block_size, is_invariant()
    capability, num_sms = config.machine(query.device)
    num_rows = config.MAX_ROWS if fixed else min(config.MAX_ROWS, triton.next_power_of_2(q_len * group))
    cut = config.choose(num_rows, k_dim, v_dim, query.dtype, key_cache.dtype, capability)
    fill = max(1, num_sms * cut.programs_per_sm // num_kv_heads)
    shape = Shape(num_tokens, q_len, capacity, window, chunk, group, cut.rows, cut.tile, fill, fixed)
    lens, table = _int32(seq_lens), _int32(block_table)
    cu, starts = (None if x is None else _int32(x) for x in (cu_seqlens_q, kv_starts))
    plan = shape.plan(lens, cu, starts)

    parts = lse = None
    slot_rows = min(cut.rows, q_len * group)
    if plan.max_slots:
        parts = query.new_empty(plan.max_slots, num_kv_heads, slot_rows, v_dim, dtype=torch.float32)
        lse = query.new_empty(plan.max_slots, num_kv_heads, slot_rows, dtype=torch.float32)
    strides = (key_cache.stride(), value_cache.stride(), _strides(key_scales), _strides(value_scales))
    heads = group, num_kv_heads, k_dim, v_dim
    return Shared(
        _attend(*strides, query.dtype, key_cache.dtype, *heads, block_size, cut, capability),
        _merge(group, num_kv_heads, v_dim, cut.rows) if plan.max_slots else None,
        grid=(plan.max_items * num_kv_heads, 1, 1),
        out_shape=(rows, num_tokens, num_heads, v_dim),
        parts=(parts, lse),
        tables=(table, lens, plan.work, cu, starts),
        sizes=(*query.stride()[:3], table.stride(0), capacity, plan.max_items, slot_rows, q_len),
        limits=(window, chunk),
    )


def _launch(
    shared: Shared,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Run the kernels. Shapes: see their parameters."""
    attend, merge, grid, out_shape, parts, tables, sizes, limits = shared
    out, bias = query.new_empty(out_shape), _contiguous(position_bias)
    attend(
        grid,
        out, *parts, query, as_bytes(key_cache), as_bytes(value_cache), *tables,
        _contiguous(sinks), _contiguous(alibi_slopes), bias, key_scales, value_scales, *sizes,
        float(scale), None if softcap is None else float(softcap), *limits,  # an int would be another kernel
        *_bias_sizes(bias),
    )  # fmt: skip
    if merge is not None:
        merge(grid, out, *parts, tables[2], tables[3], *sizes[-3:])
    return out


def is_invariant() -> bool:
    """Whether `PAGED_CACHE_BATCH_INVARIANT=1` asks for results that do not depend on the rest of the batch."""
    return os.environ.get("PAGED_CACHE_BATCH_INVARIANT") == "1"


@functools.cache
def _attend(
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    key_scale_strides: tuple[int, ...],
    value_scale_strides: tuple[int, ...],
    query_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    group: int,
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    block_size: int,
    cut: Config,
    capability: int,
) -> CachedLaunch:
    """The launch of the kernel with these constants."""
    strides = {
        "KEY": key_strides,
        "VALUE": value_strides,
        "KEY_SCALE": key_scale_strides,
        "VALUE_SCALE": value_scale_strides,
    }
    axes = ("BLOCK", "SLOT", "HEAD")
    constants: dict[str, Any] = {
        f"{name}_STRIDE_{axis}": x for name, of in strides.items() for axis, x in zip(axes, of, strict=False)
    }
    constants |= {"GROUP": group, "KV_HEADS": num_kv_heads, "K_DIM": k_dim, "V_DIM": v_dim}
    constants |= {"K_PAD": triton.next_power_of_2(k_dim), "V_PAD": triton.next_power_of_2(v_dim)}
    constants |= {"BLOCK_SIZE": block_size, "ROWS": cut.rows, "TILE": cut.tile, "CODE": _code(cache_dtype, capability)}
    constants |= {"DOT_DTYPE": _dot_dtype(query_dtype, cache_dtype), "INLINE": capability > 0}
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages, "enable_fp_fusion": True}
    return CachedLaunch(attend_kernel, constants, **options)


@functools.cache
def _merge(group: int, num_kv_heads: int, v_dim: int, rows: int) -> CachedLaunch:
    constants = {"GROUP": group, "KV_HEADS": num_kv_heads, "V_DIM": v_dim, "V_PAD": triton.next_power_of_2(v_dim)}
    return CachedLaunch(merge_kernel, constants | {"ROWS": rows, "SPLITS": 16}, num_warps=4, enable_fp_fusion=True)


def _code(cache_dtype: torch.dtype, capability: int) -> str | None:
    """What `codes.halves` calls the content of the cache."""
    e4m3 = "e4m3" if capability >= 89 else "e4m3 bits"
    return {torch.int8: "int8", torch.float8_e4m3fn: e4m3}.get(cache_dtype)


def _dot_dtype(query: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """What products are computed in: the wider of two floating point dtypes; codes of 8 bits are exact in float16."""
    if cache in LARGEST:
        return tl.float32 if query is torch.float32 else tl.float16
    dtype = torch.promote_types(query, cache)
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else TL_DTYPES[dtype]  # it gets bf16 products wrong


def _int32(x: torch.Tensor) -> torch.Tensor:
    return x.int().contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().contiguous()


def _strides(scales: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if scales is None else scales.stride()


def _bias_sizes(bias: torch.Tensor | None) -> tuple[int, int, int, int] | tuple[None, None, None, None]:
    """Strides of rows, heads and tokens, and the length."""
    if bias is None:
        return None, None, None, None
    row, head, token, _ = bias.stride()
    return row if bias.shape[0] > 1 else 0, head, token, bias.shape[3]
