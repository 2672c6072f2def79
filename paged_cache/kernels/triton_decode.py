"""Paged attention in Triton for a few new tokens per sequence: decoding, and verifying drafted tokens.

From top to bottom: the kernel that attends, the kernel that merges, the launcher, the public function.

One program serves all query heads of one KV head, so each key is read once for the whole group, and takes one split of
one sequence's visible keys. The number of splits is fixed on the host from shapes alone; how many keys a split holds is
worked out on the device from `seq_lens`. So nothing waits for the device, and a CUDA graph of the call stays right while
the sequences grow. With more than one split, a second kernel merges the partial results.
"""

import functools

import torch
import triton
import triton.language as tl

from paged_cache.errors import InvalidRequestError
from paged_cache.kernels.checks import check_shapes

MAX_ROWS = 64  # query rows (tokens x heads of a group) of one program
MAX_Q_LEN = 16  # more tokens than this are a prefill, unless they fit one program
MAX_GRID = 65535  # programs along the second and third axis of a CUDA grid
TILE_BYTES = 32 * 1024  # K and V of one loop step; two are in flight, which leaves room for two programs per SM
PROGRAMS_PER_SM = 3  # that are resident at once in the usual configuration (head dimension 128, bf16)
LONG_SPLIT = 2048  # keys: a split longer than this would be the tail of a batch of mostly short sequences
SHORT_SPLIT = 1024  # keys: splitting shorter sequences does not pay when the batch alone fills the GPU

LOG2E = tl.constexpr(1.4426950408889634)
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# Integers that change between calls are kept out of the specialisation: a longer table must not recompile the kernel.
@triton.jit(do_not_specialize=["table_stride", "capacity", "q_len", "num_splits", "min_split", "window", "chunk"])
def _attend_kernel(
    out_ptr,  # [batch, q_len, heads, num_splits, V_DIM]: the result if there is one split, else fp32 partial results
    lse_ptr,  # fp32 [batch, q_len, heads, num_splits]: log2 of the partial softmax denominators; None for one split
    query_ptr,  # [batch, heads, q_len, K_DIM]
    key_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, K_DIM]
    value_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, V_DIM]
    table_ptr,  # int32 [batch, max_blocks]
    lens_ptr,  # int32 [batch]
    sinks_ptr,  # [heads] or None
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    table_stride,
    capacity,  # tokens that a row of the table can hold
    q_len,
    num_splits,
    min_split,  # keys that a split holds at least, unless the sequence ends
    scale,
    softcap,  # or None, as are the next two
    window,
    chunk,
    KEY_STRIDE_BLOCK: tl.constexpr,  # constants of a pool, which saves a fifth of the loop's instructions
    KEY_STRIDE_SLOT: tl.constexpr,
    KEY_STRIDE_HEAD: tl.constexpr,
    VALUE_STRIDE_BLOCK: tl.constexpr,
    VALUE_STRIDE_SLOT: tl.constexpr,
    VALUE_STRIDE_HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    K_PAD: tl.constexpr,  # K_DIM and V_DIM rounded up to powers of two
    V_PAD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    row_tile = tl.program_id(0) // KV_HEADS
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)

    # The rows of the tile are the queries of this KV head, all heads of a token beside each other.
    row = row_tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_ok = token < q_len
    out_row = ((batch * q_len + token) * KV_HEADS * GROUP + head) * num_splits + split

    # Row r sees the keys first[r] .. last[r]; a query before the start of its sequence has last < 0 and sees none.
    last = tl.load(lens_ptr + batch) - q_len + token
    first = tl.zeros_like(last)
    if window is not None:
        first = tl.maximum(first, last - window + 1)
    if chunk is not None:
        first = tl.maximum(first, last // chunk * chunk)

    # Together the rows see the keys low .. high - 1. Everything outside may be unmapped (-1) and is never touched.
    high = tl.minimum(tl.max(tl.where(row_ok, last, -1), 0) + 1, capacity)
    low = tl.min(tl.where(row_ok, first, high), 0)
    per_split = tl.maximum(tl.cdiv(tl.cdiv(high - low, num_splits), TILE) * TILE, min_split)
    start = low + split * per_split
    end = tl.minimum(start + per_split, high)
    if (start >= end) & (split > 0):
        if lse_ptr is not None:
            tl.store(lse_ptr + out_row, float("-inf"), mask=row_ok)
        return

    k_dim = tl.arange(0, K_PAD)
    v_dim = tl.arange(0, V_PAD)
    query_row = batch * query_stride_batch + head.to(tl.int64) * query_stride_head + token * query_stride_token
    query_ok = row_ok[:, None] & (k_dim < K_DIM)[None, :]
    query = tl.load(query_ptr + query_row[:, None] + k_dim[None, :], mask=query_ok, other=0.0).to(DOT_DTYPE)
    key_ptr += kv_head.to(tl.int64) * KEY_STRIDE_HEAD
    value_ptr += kv_head.to(tl.int64) * VALUE_STRIDE_HEAD
    table_ptr += batch * table_stride

    # Online softmax in base 2. The sink is one more logit, so the first split starts from it: it exists in every row.
    acc = tl.zeros([ROWS, V_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)

    # Block ids are loaded one step ahead: were they loaded in the step that needs them, the compiler would not overlap
    # that step's K and V loads with the arithmetic of the step before.
    step = tl.arange(0, TILE)
    block = tl.load(table_ptr + (start + step) // BLOCK_SIZE, mask=start + step < end, other=0)
    reach = tl.minimum(last, end - 1)
    for tile in range(start, end, TILE):
        pos = tile + step  # [TILE]
        pos_ok = pos < end
        unsigned = pos.to(tl.uint32)  # division is a shift then
        block_id = block.to(tl.int64)
        block = tl.load(table_ptr + (unsigned + TILE) // BLOCK_SIZE, mask=pos + TILE < end, other=0)
        slot = (unsigned % BLOCK_SIZE).to(tl.int64)
        key_slot = block_id * KEY_STRIDE_BLOCK + slot * KEY_STRIDE_SLOT
        value_slot = block_id * VALUE_STRIDE_BLOCK + slot * VALUE_STRIDE_SLOT

        key_ok = pos_ok[:, None] & (k_dim < K_DIM)[None, :]
        key = tl.load(key_ptr + key_slot[:, None] + k_dim[None, :], mask=key_ok, other=0.0).to(DOT_DTYPE)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")  # [ROWS, TILE]
        if softcap is not None:
            # tanh(x) = 1 - 2 / (1 + exp(2x)); this form is right at both ends, where exp is inf or 0.
            score = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))
            score *= softcap * LOG2E
        else:
            score *= scale * LOG2E
        visible = pos[None, :] <= reach[:, None]
        if (window is not None) or (chunk is not None):
            visible = visible & (pos[None, :] >= first[:, None])
        score = tl.where(visible, score, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that has seen nothing yet: no inf - inf
        prob = tl.exp2(score - origin[:, None])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(prob, 1)
        top = new_top

        value_ok = pos_ok[:, None] & (v_dim < V_DIM)[None, :]
        value = tl.load(value_ptr + value_slot[:, None] + v_dim[None, :], mask=value_ok, other=0.0).to(DOT_DTYPE)
        acc = tl.dot(prob.to(DOT_DTYPE), value, acc * shrink[:, None], input_precision="ieee")

    total = tl.where(total == 0.0, 1.0, total)  # rows that saw nothing: zeros, and log2 of nothing
    result = acc / total[:, None]
    out_ok = row_ok[:, None] & (v_dim < V_DIM)[None, :]
    tl.store(out_ptr + out_row[:, None] * V_DIM + v_dim[None, :], result.to(out_ptr.dtype.element_ty), mask=out_ok)
    if lse_ptr is not None:
        tl.store(lse_ptr + out_row, top + tl.log2(total), mask=row_ok)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    out_ptr,  # [rows, V_DIM]
    part_ptr,  # fp32 [rows, num_splits, V_DIM]
    lse_ptr,  # fp32 [rows, num_splits]
    num_splits,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    v_dim = tl.arange(0, V_PAD)
    acc = tl.zeros([V_PAD], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for tile in range(0, num_splits, TILE):
        split = tile + tl.arange(0, TILE)
        lse = tl.load(lse_ptr + row * num_splits + split, mask=split < num_splits, other=float("-inf"))
        used = lse > float("-inf")  # the partial results of empty splits were never written
        part_row = part_ptr + (row * num_splits + split) * V_DIM
        part_ok = used[:, None] & (v_dim < V_DIM)[None, :]
        part = tl.load(part_row[:, None] + v_dim[None, :], mask=part_ok, other=0.0)  # [TILE, V_PAD]

        new_top = tl.maximum(top, tl.max(lse, 0))
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - origin)
        shrink = tl.exp2(top - origin)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top

    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * V_DIM + v_dim, result.to(out_ptr.dtype.element_ty), mask=v_dim < V_DIM)


# TRITON_INTERPRET was set when this file was imported: the kernels run on CPU tensors.
INTERPRETED = not isinstance(_attend_kernel, triton.runtime.JITFunction)


def _launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Run the kernels on arguments that are known to be right. Shapes: see the kernels' parameters."""
    batch, num_heads, q_len, k_dim = query.shape
    _, block_size, num_kv_heads, v_dim = value_cache.shape
    out = query.new_empty(batch, q_len, num_heads, v_dim)
    if out.numel() == 0:
        return out
    group = num_heads // num_kv_heads
    k_pad, v_pad = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    rows, num_warps = _row_tile(q_len * group, max(k_pad, v_pad), dot_dtype := _dot_dtype(query.dtype, key_cache.dtype))
    row_tiles = triton.cdiv(q_len * group, rows)
    capacity = block_table.shape[1] * block_size
    longest = min([capacity] + [x + q_len - 1 for x in (window, chunk) if x is not None])  # keys that a row can see
    num_splits, min_split = _splits(batch * num_kv_heads * row_tiles, longest, _num_sms(query.device))
    parts, lse = out, None
    if num_splits > 1:
        parts = query.new_empty(batch, q_len, num_heads, num_splits, v_dim, dtype=torch.float32)
        lse = query.new_empty(batch, q_len, num_heads, num_splits, dtype=torch.float32)
    with torch.cuda.device_of(query):
        _attend_kernel[(num_kv_heads * row_tiles, num_splits, batch)](
            parts, lse, query, key_cache, value_cache, block_table, seq_lens, sinks,
            *query.stride()[:3], block_table.stride(0),
            capacity, q_len, num_splits, min_split,
            float(scale), None if softcap is None else float(softcap), window, chunk,  # an int would be another kernel
            **_strides("KEY", key_cache), **_strides("VALUE", value_cache),
            GROUP=group, KV_HEADS=num_kv_heads, K_DIM=k_dim, V_DIM=v_dim, BLOCK_SIZE=block_size,
            ROWS=rows, TILE=_tile(k_pad + v_pad, key_cache.dtype), K_PAD=k_pad, V_PAD=v_pad,
            DOT_DTYPE=dot_dtype, num_warps=num_warps, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
        if num_splits > 1:
            _merge_kernel[(batch * q_len * num_heads,)](
                out, parts, lse, num_splits, V_DIM=v_dim, V_PAD=v_pad, TILE=16, enable_fp_fusion=True
            )
    return out


def _splits(programs: int, longest: int, num_sms: int) -> tuple[int, int]:
    """Number of splits, and the fewest keys worth one. Only shapes decide, `seq_lens` stays on the device.

    Args:
        programs: Programs of one split.
        longest: Keys that the longest row can see.
        num_sms: Multiprocessors of the GPU.
    """
    fill = triton.cdiv(PROGRAMS_PER_SM * num_sms, programs)  # occupies every multiprocessor
    balance = min(triton.cdiv(longest, LONG_SPLIT), 8 * fill)  # 8: most of these programs may have nothing to do
    min_split = 64 if fill > 1 else SHORT_SPLIT
    return max(1, min(max(fill, balance), triton.cdiv(longest, min_split))), min_split


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _strides(name: str, cache: torch.Tensor) -> dict[str, int]:
    axes = ("BLOCK", "SLOT", "HEAD")
    return {f"{name}_STRIDE_{axis}": stride for axis, stride in zip(axes, cache.stride(), strict=False)}


def _row_tile(num_rows: int, padded_dim: int, dot_dtype: tl.dtype) -> tuple[int, int]:
    """Query rows of one program, and its warps: as many rows as registers and shared memory hold.

    16 rows are the least that tensor cores take. float32 does without them: more rows would only spill registers.
    """
    if dot_dtype == tl.float32:
        return 16, 8
    rows = min(MAX_ROWS, 8192 // padded_dim, max(16, triton.next_power_of_2(num_rows)))
    return rows, 4 if rows * padded_dim <= 4096 else 8


def _tile(padded_dims: int, dtype: torch.dtype) -> int:
    """Keys per loop step, a power of two. Each takes `padded_dims` elements, its value included."""
    tile = 64
    while tile > 16 and tile * padded_dims * dtype.itemsize > TILE_BYTES:
        tile //= 2
    return tile


def _dot_dtype(query: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """What the matrix products are computed in. The interpreter gets bf16 products wrong without a word."""
    dtype = torch.promote_types(query, cache)
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TL_DTYPES[dtype]


_NOT_YET = ("cu_seqlens_q", "alibi_slopes", "position_bias", "kv_starts", "key_scales", "value_scales")


def supports(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, **options: object) -> str | None:
    """Why `paged_attention` does not take a call with these tensors, or None if it does. All options are supported."""
    q_len, group = query.shape[2], query.shape[1] // key_cache.shape[2]
    block_size = key_cache.shape[1]
    if new := [name for name in _NOT_YET if options.get(name) is not None]:
        return f"{', '.join(new)}: not yet"
    if reason := _device_problem(query.device):
        return reason
    if q_len > MAX_Q_LEN and q_len * group > MAX_ROWS:
        return f"{q_len} new tokens per sequence are more than {MAX_Q_LEN}"
    if key_cache.dtype != value_cache.dtype or not {query.dtype, key_cache.dtype} <= TL_DTYPES.keys():
        return f"query is {query.dtype}, key cache {key_cache.dtype}, value cache {value_cache.dtype}"
    if not all(16 <= x.shape[-1] <= 256 for x in (key_cache, value_cache)):
        return f"head dimensions {key_cache.shape[-1]} and {value_cache.shape[-1]} are not within 16 .. 256"
    if block_size < 4 or block_size & (block_size - 1):
        return f"block size {block_size} is not a power of two of at least 4"
    strides = [x.stride(-1) for x in (query, key_cache, value_cache)]
    if strides != [1, 1, 1]:
        return f"the last strides {strides} are not all 1"
    if query.shape[0] > MAX_GRID:
        return f"batch size {query.shape[0]} is above {MAX_GRID}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "it has no backward pass, and the query requires grad"
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
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """Causal attention of the last `q_len` tokens of each sequence, read through a block table.

    Same contract as `reference.paged_attention`, for the calls that `supports` accepts. Never waits for the device, and
    may be captured in a CUDA graph: `block_table` and `seq_lens` are read when the graph runs.

    Args:
        query: `[batch, num_heads, q_len, head_dim]`, last dimension contiguous, `q_len` at most 16 or so.
        key_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`, any strides, last dimension contiguous.
        value_cache: `[num_blocks, block_size, num_kv_heads, v_head_dim]`, likewise.
        block_table: int32 `[batch, max_blocks]`. Entries that no query can see may be -1 and are never read.
        seq_lens: int32 `[batch]`, tokens of each row, the `q_len` new ones included.
        scale: Factor on the scores.
        window: Each query sees at most its last `window` keys, itself included.
        chunk: Each query sees only keys of its own chunk.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        sinks: `[num_heads]`, one extra logit per head in the softmax denominator.

    Returns:
        `[batch, q_len, num_heads, v_head_dim]` in the dtype of `query`, contiguous.

    Raises:
        InvalidRequestError: Shapes do not fit each other, or `supports` gives a reason.
    """
    check_shapes(query, key_cache, value_cache, block_table, seq_lens, sinks=sinks)
    if reason := supports(query, key_cache, value_cache):
        raise InvalidRequestError(f"the Triton decode kernel does not take this call: {reason}")
    tables = block_table.int().contiguous(), seq_lens.int().contiguous()
    sinks = None if sinks is None else sinks.detach().contiguous()
    return _launch(
        query, key_cache, value_cache, *tables, scale=scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks
    )
