"""Paged attention in Triton: decoding, drafted tokens, chunks and whole prompts, over blocks, in one kernel.

One program serves all query heads of one KV head, so each key is read once for the whole group: it takes a tile of query
rows and a split of the keys that they see, as the work list of `plan` says. Where keys are split, a second kernel merges
the partial results.
"""

import triton
import triton.language as tl

from .codes import E4M3_TO_HALF, halves
from .plan import visible

LOG2E = tl.constexpr(1.4426950408889634)


# Integers that change between calls are kept out of the specialisation: a longer table must not recompile the kernel.
@triton.jit(
    do_not_specialize=[
        "table_stride", "capacity", "max_items", "slot_rows", "q_len", "window", "chunk",
        "bias_stride_row", "bias_stride_head", "bias_stride_token", "bias_len",
    ]
)  # fmt: skip
def attend_kernel(
    out_ptr,  # [tokens, heads, V_DIM]
    part_ptr,  # fp32 [slots, KV_HEADS, slot_rows, V_DIM]: results of splits; None if there are none
    lse_ptr,  # fp32 [slots, KV_HEADS, slot_rows]: log2 of their softmax denominators
    query_ptr,  # [batch, heads, q_len, K_DIM], packed [1, heads, tokens, K_DIM]
    key_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, K_DIM]
    value_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, V_DIM]
    table_ptr,  # int32 [batch, max_blocks]
    lens_ptr,  # int32 [batch]
    work_ptr,  # int32 [6, max_items], see plan.FIELDS
    cu_ptr,  # int32 [batch + 1], or None; None may be all below
    starts_ptr,  # int32 [batch]
    sinks_ptr,  # [heads]
    slopes_ptr,  # [heads]
    bias_ptr,  # [1 or batch, heads, q_len, bias_len]
    key_scales_ptr,  # fp32 [num_blocks, BLOCK_SIZE, KV_HEADS]
    value_scales_ptr,
    query_stride_row,
    query_stride_head,
    query_stride_token,
    table_stride,
    capacity,  # keys that a row of the table can hold
    max_items,
    slot_rows,  # query rows that a slot has room for
    q_len,
    scale,
    softcap,  # or None, as are the next two
    window,
    chunk,
    bias_stride_row,
    bias_stride_head,
    bias_stride_token,
    bias_len,
    KEY_STRIDE_BLOCK: tl.constexpr,  # constants of a pool, which saves a fifth of the loop's instructions
    KEY_STRIDE_SLOT: tl.constexpr,
    KEY_STRIDE_HEAD: tl.constexpr,
    VALUE_STRIDE_BLOCK: tl.constexpr,
    VALUE_STRIDE_SLOT: tl.constexpr,
    VALUE_STRIDE_HEAD: tl.constexpr,
    KEY_SCALE_STRIDE_BLOCK: tl.constexpr,
    KEY_SCALE_STRIDE_SLOT: tl.constexpr,
    KEY_SCALE_STRIDE_HEAD: tl.constexpr,
    VALUE_SCALE_STRIDE_BLOCK: tl.constexpr,
    VALUE_SCALE_STRIDE_SLOT: tl.constexpr,
    VALUE_SCALE_STRIDE_HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,  # K_DIM and V_DIM rounded up to powers of two
    V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CODE: tl.constexpr,  # see codes.halves, or None
    DOT_DTYPE: tl.constexpr,
    INLINE: tl.constexpr,
):
    """One query tile of one KV head over one split of its keys: program `item * KV_HEADS + kv_head`."""
    kv_head = tl.program_id(0) % KV_HEADS
    item = tl.program_id(0) // KV_HEADS
    row = tl.load(work_ptr + item)
    if row < 0:
        return
    tile = tl.load(work_ptr + max_items + item)
    split = tl.load(work_ptr + 2 * max_items + item)
    num_splits = tl.load(work_ptr + 3 * max_items + item)
    split_len = tl.load(work_ptr + 4 * max_items + item)
    slot = tl.load(work_ptr + 5 * max_items + item)
    length = tl.load(lens_ptr + row)
    row = row.to(tl.int64)
    token_base = row * q_len
    query_ptr += row * query_stride_row
    if cu_ptr is not None:
        token_base = tl.load(cu_ptr + row).to(tl.int64)
        q_len = (tl.load(cu_ptr + row + 1) - token_base).to(tl.int32)
        query_ptr += token_base * query_stride_token - row * query_stride_row
    start = 0
    if starts_ptr is not None:
        start = tl.load(starts_ptr + row)

    # The query rows of the tile: all heads of a token beside each other.
    query_row = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    token = query_row // GROUP
    head = kv_head * GROUP + query_row % GROUP
    row_ok = token < q_len
    token_low = tile * ROWS // GROUP
    token_high = tl.minimum((tile * ROWS + ROWS - 1) // GROUP, q_len - 1)

    # Together they see the keys low .. high - 1, of which this split walks over begin .. end - 1, and all of them see
    # those from all_low to all_high - 1. Keys that no row sees may be unmapped (-1) and are never touched.
    low, high = visible(length, q_len, token_low, token_high, start, window, chunk, capacity)
    all_low, _ = visible(length, q_len, token_high, token_high, start, window, chunk, capacity)
    all_high = length - q_len + token_low + 1
    begin = low // TILE * TILE + split * split_len
    end = tl.where(split == num_splits - 1, high, tl.minimum(begin + split_len, high))
    end = tl.where(low < high, end, begin)
    if part_ptr is not None:
        part_row = ((slot + split).to(tl.int64) * KV_HEADS + kv_head) * slot_rows + tl.arange(0, ROWS)
        if (begin >= end) & (split > 0):
            tl.store(lse_ptr + part_row, float("-inf"), mask=row_ok)
            return
    full_begin = tl.maximum(tl.cdiv(all_low, TILE) * TILE, begin)
    full_end = tl.maximum(tl.minimum(all_high, end) // TILE * TILE, full_begin)

    # Row r sees the keys first[r] .. last[r]; a query before the start of its sequence has last < 0 and sees none.
    last = length - q_len + token
    first, _ = visible(length, q_len, token, token, start, window, chunk, capacity)

    k_dim = tl.arange(0, K_PAD)
    v_dim = tl.arange(0, V_PAD)
    query_at = head.to(tl.int64) * query_stride_head + token.to(tl.int64) * query_stride_token
    query_ok = row_ok[:, None] & (k_dim < K_DIM)[None, :]
    query = tl.load(query_ptr + query_at[:, None] + k_dim[None, :], mask=query_ok, other=0.0)
    factor = scale * LOG2E  # scores are in base 2
    if softcap is not None:
        factor = scale / softcap * (2.0 * LOG2E)
    if CODE is not None:
        # Products of codes are taken in float16. What could overflow there is divided by a power of two before.
        largest = tl.max(tl.abs(query.to(tl.float32)), 1)
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(unit == 0.0, 1.0, unit)
        query = query.to(tl.float32) / unit[:, None]
        factor = (unit * factor)[:, None]
    query = query.to(DOT_DTYPE)

    key_ptr += kv_head.to(tl.int64) * KEY_STRIDE_HEAD
    value_ptr += kv_head.to(tl.int64) * VALUE_STRIDE_HEAD
    table_ptr += row * table_stride
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
    if bias_ptr is not None:
        bias_ptr += row * bias_stride_row
        bias_at = head.to(tl.int64) * bias_stride_head + token.to(tl.int64) * bias_stride_token

    # Online softmax. The sink is one more logit, so the first split starts from it: it exists in every tile.
    acc = tl.zeros([ROWS, V_PAD], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)

    step = tl.arange(0, TILE)
    LOW_EDGE: tl.constexpr = (window is not None) or (chunk is not None) or (starts_ptr is not None)
    ONE_BLOCK: tl.constexpr = BLOCK_SIZE % TILE == 0
    for phase in tl.static_range(0 if LOW_EDGE else 1, 3):  # 0, 2: the lower and upper edge, 1: what all rows see
        if phase == 0:
            tile_begin, tile_end = begin, tl.minimum(full_begin, end)
        elif phase == 1:
            tile_begin, tile_end = full_begin, full_end
        else:
            tile_begin, tile_end = full_end, end

        # Block ids are loaded one step ahead: were they loaded in the step that needs them, the compiler would not
        # overlap that step's K and V loads with the arithmetic of the step before.
        if ONE_BLOCK:
            block = tl.load(table_ptr + tile_begin // BLOCK_SIZE, mask=tile_begin < tile_end, other=0)
        else:
            pos = tile_begin + step
            block = tl.load(table_ptr + pos // BLOCK_SIZE, mask=(pos >= low) & (pos < tile_end), other=0)
        for key_begin in range(tile_begin, tile_end, TILE):
            pos = key_begin + step  # [TILE]
            unsigned = pos.to(tl.uint32)  # division is a shift then
            block_id = block.to(tl.int64)
            if ONE_BLOCK:
                ahead = key_begin + TILE
                block = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < tile_end, other=0)
            else:
                block = tl.load(table_ptr + (unsigned + TILE) // BLOCK_SIZE, mask=pos + TILE < tile_end, other=0)
            in_block = (unsigned % BLOCK_SIZE).to(tl.int64)
            key_at = block_id * KEY_STRIDE_BLOCK + in_block * KEY_STRIDE_SLOT
            value_at = block_id * VALUE_STRIDE_BLOCK + in_block * VALUE_STRIDE_SLOT
            key_ok = (k_dim < K_DIM)[None, :]
            value_ok = (v_dim < V_DIM)[None, :]
            if phase != 1:
                pos_ok = (pos >= low) & (pos < end)
                key_ok = key_ok & pos_ok[:, None]
                value_ok = value_ok & pos_ok[:, None]
            else:
                pos_ok = pos < end

            if phase != 1 or K_DIM < K_PAD:
                key = tl.load(key_ptr + key_at[:, None] + k_dim[None, :], mask=key_ok, other=0)
            else:
                key = tl.load(key_ptr + key_at[:, None] + k_dim[None, :])
            if CODE is not None:
                key = halves(key, CODE, INLINE)
            score = tl.dot(query, tl.trans(key.to(DOT_DTYPE)), input_precision="ieee")  # [ROWS, TILE]
            if CODE is not None:
                key_scale_at = block_id * KEY_SCALE_STRIDE_BLOCK + in_block * KEY_SCALE_STRIDE_SLOT
                key_scale_at += kv_head * KEY_SCALE_STRIDE_HEAD
                key_scale = tl.load(key_scales_ptr + key_scale_at, mask=pos_ok, other=0.0)
                if CODE == "e4m3 bits":
                    key_scale *= E4M3_TO_HALF
                score *= key_scale[None, :]
            score *= factor
            if softcap is not None:
                # tanh(x) = 1 - 2 / (1 + exp(2x)); this form is right at both ends, where exp is inf or 0.
                score = (1.0 - 2.0 / (1.0 + tl.exp2(score))) * (softcap * LOG2E)
            if slopes_ptr is not None:
                score += slope[:, None] * (pos[None, :] - last[:, None]).to(tl.float32)
            if bias_ptr is not None:
                bias_ok = row_ok[:, None] & (pos < bias_len)[None, :]
                bias = tl.load(bias_ptr + bias_at[:, None] + pos[None, :], mask=bias_ok, other=0.0)
                score += bias.to(tl.float32) * LOG2E
            if phase != 1:
                seen = (pos[None, :] <= last[:, None]) & (pos < end)[None, :]
                if LOW_EDGE:
                    seen = seen & (pos[None, :] >= first[:, None])
                score = tl.where(seen, score, float("-inf"))

            new_top = tl.maximum(top, tl.max(score, 1))
            origin = new_top
            if phase != 1 or bias_ptr is not None:  # a row may have seen nothing: no inf - inf
                origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            prob = tl.exp2(score - origin[:, None])
            shrink = tl.exp2(top - origin)
            total = total * shrink + tl.sum(prob, 1)
            acc = acc * shrink[:, None]
            top = new_top

            if phase != 1 or V_DIM < V_PAD:
                value = tl.load(value_ptr + value_at[:, None] + v_dim[None, :], mask=value_ok, other=0)
            else:
                value = tl.load(value_ptr + value_at[:, None] + v_dim[None, :])
            if CODE is not None:
                value = halves(value, CODE, INLINE).to(DOT_DTYPE)
                value_scale_at = block_id * VALUE_SCALE_STRIDE_BLOCK + in_block * VALUE_SCALE_STRIDE_SLOT
                value_scale_at += kv_head * VALUE_SCALE_STRIDE_HEAD
                value_scale = tl.load(value_scales_ptr + value_scale_at, mask=pos_ok, other=0.0)
                largest_scale = tl.max(value_scale, 0)
                largest_scale = tl.where(largest_scale == 0.0, 1.0, largest_scale)
                prob = prob * (value_scale / largest_scale)[None, :]  # at most 1: right in float16
                if CODE == "e4m3 bits":
                    largest_scale *= E4M3_TO_HALF
                acc += tl.dot(prob.to(DOT_DTYPE), value, input_precision="ieee") * largest_scale
            else:
                acc = tl.dot(prob.to(DOT_DTYPE), value.to(DOT_DTYPE), acc, input_precision="ieee")

    total = tl.where(total == 0.0, 1.0, total)  # rows that saw nothing: zeros, and log2 of nothing
    result = acc / total[:, None]
    out_ok = row_ok[:, None] & (v_dim < V_DIM)[None, :]
    out_row = (token_base + token) * (KV_HEADS * GROUP) + head
    if part_ptr is not None:  # noqa: SIM102  for the compiler; the other condition is for the program
        if slot >= 0:
            tl.store(part_ptr + part_row[:, None] * V_DIM + v_dim[None, :], result, mask=out_ok)
            tl.store(lse_ptr + part_row, top + tl.log2(total), mask=row_ok)
            return
    tl.store(out_ptr + out_row[:, None] * V_DIM + v_dim[None, :], result.to(out_ptr.dtype.element_ty), mask=out_ok)


@triton.jit(do_not_specialize=["max_items", "slot_rows", "q_len"])
def merge_kernel(
    out_ptr,  # all as in attend_kernel
    part_ptr,
    lse_ptr,
    work_ptr,
    cu_ptr,
    max_items,
    slot_rows,
    q_len,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,  # partial results of one step
):
    """The results of a query tile's splits become one: the same programs as of attend_kernel."""
    kv_head = tl.program_id(0) % KV_HEADS
    item = tl.program_id(0) // KV_HEADS
    row = tl.load(work_ptr + item).to(tl.int64)
    slot = tl.load(work_ptr + 5 * max_items + item)
    if (row < 0) | (slot < 0):
        return
    tile = tl.load(work_ptr + max_items + item)
    split = tl.load(work_ptr + 2 * max_items + item)
    num_splits = tl.load(work_ptr + 3 * max_items + item)
    token_base = row * q_len
    if cu_ptr is not None:
        token_base = tl.load(cu_ptr + row).to(tl.int64)
        q_len = (tl.load(cu_ptr + row + 1) - token_base).to(tl.int32)

    # The programs that made the partial results of a tile share its rows among them.
    v_dim = tl.arange(0, V_PAD)
    for r in range(split, tl.minimum(q_len * GROUP - tile * ROWS, ROWS), num_splits):
        acc = tl.zeros([V_PAD], tl.float32)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        for begin in range(0, num_splits, SPLITS):
            each = begin + tl.arange(0, SPLITS)
            part_row = ((slot + each).to(tl.int64) * KV_HEADS + kv_head) * slot_rows + r
            lse = tl.load(lse_ptr + part_row, mask=each < num_splits, other=float("-inf"))
            used = (lse != float("-inf"))[:, None]  # the partial results of empty splits were never written
            part_ok = used & (v_dim < V_DIM)[None, :]
            part = tl.load(part_ptr + part_row[:, None] * V_DIM + v_dim[None, :], mask=part_ok, other=0.0)

            new_top = tl.maximum(top, tl.max(lse, 0))
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight = tl.exp2(lse - origin)
            shrink = tl.exp2(top - origin)
            acc = acc * shrink + tl.sum(part * weight[:, None], 0)
            total = total * shrink + tl.sum(weight, 0)
            top = new_top
        result = acc / tl.where(total == 0.0, 1.0, total)
        query_row = tile * ROWS + r
        out_row = (token_base + query_row // GROUP) * (KV_HEADS * GROUP) + kv_head * GROUP + query_row % GROUP
        tl.store(out_ptr + out_row * V_DIM + v_dim, result.to(out_ptr.dtype.element_ty), mask=v_dim < V_DIM)
