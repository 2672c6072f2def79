"""Paged attention on CPU: what the compiled kernel takes, and how a call is cut for it."""

import operator
from collections import OrderedDict
from typing import Any

import torch

from paged_cache.kernels.checks import check_contents, check_shapes

from ..memo import REPEAT
from . import kernel, results, units
from .launching import KINDS, Launch, Workspace, num_threads, workspace

MAX_ROWS = 32  # (query, head) pairs that walk over keys and values together, if they have more than one kv head
SERIAL_BYTES = 256 * 1024  # with less K and V and
SERIAL_PRODUCTS = 256 * 1024  # fewer products a second thread costs more than it brings
E4M3_UNIT = 256.0  # see `simd_memory`

_QUERY_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # index of record.QUERY_KINDS
_NO_STRIDES = (0, 0, 0)
MOST_RECENT = 64
_recent: OrderedDict[Any, Launch] = OrderedDict()


def supports(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, **options: Any) -> str | None:
    """Why the kernel cannot take a call with these tensors, or None if it can."""
    if not (query.is_cpu and key_cache.is_cpu and value_cache.is_cpu):
        return "a tensor is not on the CPU"
    if query.dtype not in _QUERY_KINDS:
        return f"queries are {query.dtype}, not float32, bfloat16 or float16"
    if key_cache.dtype not in KINDS or value_cache.dtype is not key_cache.dtype:
        return f"keys are {key_cache.dtype} and values {value_cache.dtype}, not both of one of {list(KINDS)}"
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        return "the last dimension of keys or values is not contiguous"
    if torch.is_grad_enabled():
        others = (options.get(name) for name in ("sinks", "alibi_slopes", "position_bias"))
        if any(x is not None and x.requires_grad for x in (query, *others)):
            return "a gradient is asked for"
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
    """Causal attention through a block table; see `reference.paged_attention` for shapes and meaning.

    For tensors that `supports` takes. Compiles on the first call for a dtype of the cache. `memo` keeps the packed
    arguments, so that further layers of a step are not checked and planned again; those of one query per row are also
    kept for further steps whose tables and lengths lie where they lay.
    """
    varying = query, key_cache, value_cache, sinks, alibi_slopes, position_bias, key_scales, value_scales
    tables = block_table, seq_lens, cu_seqlens_q, kv_starts
    kind = None
    if memo is not None:
        kind = scale, window, chunk, softcap, max_q_len, *map(_look, varying), *map(_address, tables)
    launch: Launch | None = None if memo is None else memo.get(kind)
    query = query if query.stride()[-1:] == (1,) else query.contiguous()
    # Each tensor that is made here has to live until the kernel has run.
    sinks, alibi_slopes, position_bias = _float32(sinks), _float32(alibi_slopes), _float32(position_bias)
    place = None
    if launch is None and memo is not None and query.shape[2] == 1 and cu_seqlens_q is None and kv_starts is None:
        place = kind, _look(block_table), _look(seq_lens), num_threads()
        launch = _recent.get(place)
        memo[kind] = launch
    if launch is None or not launch.is_ours:
        options: dict[str, Any] = {"window": window, "chunk": chunk, "softcap": softcap}
        options |= {"sinks": sinks, "alibi_slopes": alibi_slopes}
        options |= {"position_bias": position_bias, "key_scales": key_scales, "value_scales": value_scales}
        options |= {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max_q_len, "kv_starts": kv_starts}
        check_shapes(query, key_cache, value_cache, block_table, seq_lens, **options)
        if memo is None:  # with one, the caller has prepared tables for many calls
            check_contents(block_table, key_cache.shape[0], cu_seqlens_q, max_q_len, query.shape[2])
        launch = _prepare(query, key_cache, value_cache, block_table, seq_lens, scale=scale, **options)
        if memo is not None:
            memo[kind] = launch
        if place is not None and not launch.copies:  # what was copied may change behind the copy
            _remember(place, launch)
    if memo is not None and all(x is None for x in varying[3:]):
        memo[REPEAT, scale, window, chunk, softcap] = Repeat(launch, varying[:3], (*tables, max_q_len))
    rows, num_heads, q_len, _ = query.shape
    out = query.new_empty((rows, q_len, num_heads, value_cache.shape[3]))
    launch.run(
        query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), out.data_ptr(),
        _address(sinks), _address(alibi_slopes), _address(position_bias), _address(key_scales), _address(value_scales),
    )  # fmt: skip
    return out


class Repeat:
    """The last call again, with other queries, keys and values of the same kind: nothing is looked up or packed anew.

    Args:
        launch: Of the last call, which had no sinks, biases and scales.
        tensors: Its query, keys and values.
        same: Its block table, lengths and so on, which have to be the same objects.
    """

    def __init__(self, launch: Launch, tensors: tuple[torch.Tensor, ...], same: tuple[Any, ...]) -> None:
        query, _, value_cache = tensors
        self._launch, self._looks, self._same = launch, tuple(map(_look, tensors)), same
        self._shape = (query.shape[0], query.shape[2], query.shape[1], value_cache.shape[3])
        self._is_plain = query.stride(3) == 1

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *same: Any
    ) -> torch.Tensor | None:
        """The result, or None if something is different this time."""
        is_like = self._looks == (_look(query), _look(key_cache), _look(value_cache))
        is_ours = self._is_plain and self._launch.is_ours and all(map(operator.is_, same, self._same))
        if not (is_like and is_ours) or (query.requires_grad and torch.is_grad_enabled()):
            return None
        out = query.new_empty(self._shape)
        addresses = query.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), out.data_ptr()
        self._launch.run(*addresses, 0, 0, 0, 0, 0)
        return out


def _remember(place: Any, launch: Launch) -> None:
    """For calls to come whose tensors lie in the same places; nothing is kept alive by it."""
    _recent[place] = launch
    if len(_recent) > MOST_RECENT:
        _recent.popitem(last=False)


def _look(x: torch.Tensor | None) -> Any:
    """What of a tensor decides how it is read."""
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _prepare(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    cu_seqlens_q: torch.Tensor | None,
    max_q_len: int | None,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    position_bias: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    **_: Any,
) -> Launch:
    """Plans and packs calls whose arguments are known to be right."""
    num_heads, num_tokens, dim = query.shape[1:]
    block_size, num_kv_heads, v_dim = value_cache.shape[1:]
    batch, width = block_table.shape
    given = block_table, seq_lens, cu_seqlens_q, kv_starts
    block_table, seq_lens, cu_seqlens_q, kv_starts = read = tuple(map(_int32, given))
    copies = [x for x, original in zip(read, given, strict=True) if x is not original]
    kv_len, element = width * block_size, key_cache.element_size()
    if max_q_len is None:
        max_q_len, num_tokens = num_tokens, batch * num_tokens
    num_bytes = batch * kv_len * num_kv_heads * (dim + v_dim) * element
    is_small = num_bytes <= SERIAL_BYTES and num_tokens * kv_len * num_heads * (dim + v_dim) <= SERIAL_PRODUCTS
    threads = 1 if is_small else num_threads()
    tokens = batch, max_q_len, num_tokens, kv_len
    rows_q, heads, rows, memory = _plan(*tokens, num_heads, num_kv_heads, dim, v_dim, threads)
    rest = (
        block_table.data_ptr(), seq_lens.data_ptr(), _address(kv_starts), _address(cu_seqlens_q),
        memory.partials, memory.done, memory.scratch,
        batch, num_heads, num_kv_heads, max_q_len, dim, v_dim, block_size,
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
        *(_NO_STRIDES if key_scales is None else key_scales.stride()),
        *(_NO_STRIDES if value_scales is None else value_scales.stride()),
        *((0, 0, 0, 0) if position_bias is None else _bias_strides(position_bias)),
        block_table.stride(0), width, window or 0, chunk or 0, _QUERY_KINDS[query.dtype], rows_q, heads, rows, element,
        scale, softcap or 0.0, E4M3_UNIT if key_cache.dtype is torch.float8_e4m3fn else 1.0,
    )  # fmt: skip
    return Launch(key_cache.dtype, threads, memory, rest, copies)


def _plan(
    batch: int,
    max_q_len: int,
    num_tokens: int,
    kv_len: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    v_dim: int,
    threads: int,
) -> tuple[int, int, int, Workspace]:
    """How a call is cut into items: their queries, kv heads and (query, head) pairs at most, and memory for them."""
    group, v_width = num_heads // num_kv_heads, -(-v_dim // 16) * 16
    rows_q = max(1, min(max_q_len, MAX_ROWS // group))
    runs, tiles = -(-kv_len // units.RUN), min(batch * -(-max_q_len // rows_q), num_tokens // rows_q + batch)
    items = min(tiles * runs, batch * units.MAX_RUNS + tiles)  # at most, if each has all heads
    heads = num_kv_heads  # as many as have room in the first-level cache; fewer if threads would have nothing to do
    while heads > 1 and (num_kv_heads % heads or heads * group > MAX_ROWS or items * num_kv_heads < threads * heads):
        heads -= 1
    rows = max(rows_q * group, min(MAX_ROWS, heads * rows_q * group))
    partials = items * num_kv_heads * rows * (v_width + results.MORE) if runs > 1 else 0
    scratch = threads * sum(kernel.scratch_floats(rows, heads, -(-dim // 16) * 16, v_width))
    return rows_q, heads, rows, workspace(tiles * num_kv_heads, partials, scratch)


def _int32(tensor: Any) -> Any:
    """Block table or lengths as the kernel reads them; None stays."""
    if tensor is None or (tensor.dtype is torch.int32 and tensor.stride(-1) == 1):
        return tensor
    return tensor.int().contiguous()


def _float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to scores as the kernel reads it."""
    if tensor is None:
        return None
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bias_strides(bias: torch.Tensor) -> tuple[int, ...]:
    """One row of bias may serve the whole batch."""
    row, head, query, _ = bias.stride()
    return 0 if bias.shape[0] == 1 else row, head, query, bias.shape[3]
