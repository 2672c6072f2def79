"""The same as operators of torch, `torch.ops.paged_cache.*`: what a traced graph holds in place of a kernel call.

`paged_attention` turns to its operator while `torch.compile` or `torch.export` traces, and only then: a call
through torch's dispatcher takes microseconds. The operators take the pool as an argument, so that a graph says what it reads
and writes, and any pool of the same shape can be given to it. Inductor writes into it in place. The backend `aot_eager`, which
is for debugging, copies the whole of a pool that a graph writes to; reading costs it nothing.
"""

from typing import Any

import torch

from . import dispatch

library = torch.library.Library("paged_cache", "DEF")

library.define(
    "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, *, float scale, "
    "Tensor? cu_seqlens_q=None, SymInt? max_q_len=None, SymInt? window=None, SymInt? chunk=None, float? softcap=None, "
    "Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? position_bias=None, Tensor? kv_starts=None, "
    "Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor"
)
library.define(
    "write_kv(Tensor keys, Tensor values, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, *, "
    "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> ()"
)
library.define("copy_blocks(Tensor[] sources, Tensor(a!)[] destinations, Tensor pairs) -> ()")


def _attention(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *tables: torch.Tensor, **options: Any
) -> torch.Tensor:
    kernel = dispatch.choose(query, key_cache, value_cache, options)
    return kernel.paged_attention(query, key_cache, value_cache, *tables, **options)  # type: ignore[no-any-return]


library.impl("attention", _attention, "CompositeExplicitAutograd")
library.impl("write_kv", dispatch.write_kv, "CompositeExplicitAutograd")
library.impl("copy_blocks", dispatch.copy_blocks, "CompositeExplicitAutograd")


def _empty_result(
    query: torch.Tensor, _: torch.Tensor, value_cache: torch.Tensor, *__: Any, **___: Any
) -> torch.Tensor:
    rows, num_heads, q_len, _dim = query.shape
    return query.new_empty(rows, q_len, num_heads, value_cache.shape[3])


torch.library.register_fake("paged_cache::attention", _empty_result, lib=library)
torch.library.register_fake("paged_cache::write_kv", lambda *_, **__: None, lib=library)
torch.library.register_fake("paged_cache::copy_blocks", lambda *_, **__: None, lib=library)
