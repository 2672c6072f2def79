"""What the launcher tells the CPU kernel: one record per call."""

import numpy as np

from .scratch import F32

BF16, F16, E4M3 = np.uint16(0), np.int16(0), np.uint8(0)  # how simd_memory.py knows dtypes that numba lacks
QUERY_KINDS = (F32, BF16, F16)

# fmt: off
COUNTERS = ("next_item", "next_thread")  # atomic, first in the record; 0 before a call
VARYING = (  # addresses that are others in each layer of a step
    "query", "key", "value", "out", "sinks", "slopes", "bias", "key_scales", "value_scales",  # from sinks on, 0: without
)
INTEGERS = (
    "table", "lens", "starts", "first_queries",  # addresses; 0 for the last two: without
    "partials", "done", "scratch",
    "batch", "num_heads", "num_kv_heads", "q_len", "dim", "v_dim", "block_size",  # q_len: the longest if rows are packed
    "q_batch", "q_head", "q_token",  # strides in elements, here and below
    "key_block", "key_token", "key_head",
    "value_block", "value_token", "value_head",
    "key_scales_block", "key_scales_token", "key_scales_head",
    "value_scales_block", "value_scales_token", "value_scales_head",
    "bias_batch", "bias_head", "bias_query", "bias_len",
    "table_row", "table_width",
    "window", "chunk",  # 0: none
    "query_kind",  # index of `QUERY_KINDS`, of queries and output
    "rows_q", "heads", "rows",  # queries, kv heads and (query, head) pairs per item, at most
    "element",  # bytes of an element of the cache
)
# fmt: on
REALS = ("scale", "softcap", "unit")  # unit: what the cache holds is read as 1 / unit of it
CALL = np.dtype([(name, np.int64) for name in COUNTERS + VARYING + INTEGERS] + [(name, np.float64) for name in REALS])
