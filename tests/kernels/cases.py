"""Random paged attention calls whose unused memory is poisoned: the inputs of all kernel tests."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from paged_cache.kernels.quantized import LARGEST, dequantize, quantize

Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes and features of one attention call. `str(case)` lists what differs from the defaults and names a test."""

    lens: tuple[int, ...] = (37, 1, 130, 0)  # below, in and far beyond the first tile of 64; a row of padding
    q_len: int = 1
    q_lens: tuple[int, ...] | None = None  # of each row, for the packed form
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    v_head_dim: int | None = None  # None: as head_dim
    block_size: int = 16
    layout: str = "NHD"  # see `_pool`
    dtype: torch.dtype = torch.float32
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    bias: int = 0  # rows of a position bias: none, one for all, or one per row
    starts: tuple[int, ...] | None = None  # per row the first key that is not hidden
    kv_dtype: torch.dtype | None = None  # of a quantised cache
    gain: float = 1.0  # factor on the scores
    spare_blocks: int = 2  # unused columns at the end of the block table
    num_splits: int | None = None  # None: what the kernel chooses

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{name}={_short(value)}" for name, value in changed) or "default"

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """New tokens of each row."""
        return self.q_lens or (self.q_len,) * len(self.lens)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case. `keys[b]`, `values[b]` are row b's dense `[len, num_kv_heads, dim]`, what the pool holds."""

    case: Case
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    extras: dict[str, torch.Tensor]  # the keyword arguments that are tensors

    @property
    def options(self) -> dict:
        """Keyword arguments of the call."""
        case = self.case
        return {
            "scale": case.gain * case.head_dim**-0.5,
            "window": case.window,
            "chunk": case.chunk,
            "softcap": case.softcap,
            **({"max_q_len": max(case.q_lens)} if case.q_lens else {}),
            **self.extras,
        }

    def run(self, kernel: Kernel) -> torch.Tensor:
        """The output of `kernel` on these tensors."""
        tensors = (self.query, self.key_cache, self.value_cache, self.block_table, self.seq_lens)
        return kernel(*tensors, **self.options)

    def double(self) -> "Inputs":
        """The same numbers in float64, on the CPU: what the reference is given to be exact."""
        names = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
        return replace(
            self,
            **{name: _double(getattr(self, name)) for name in names},
            extras={name: x.cpu() if name.endswith("scales") else _double(x) for name, x in self.extras.items()},
        )


def build(case: Case, device: str = "cpu") -> Inputs:
    """Random tensors for `case`: slots that no query sees hold NaN, table entries that no query needs are -1."""
    torch.manual_seed(0)
    v_dim = case.v_head_dim or case.head_dim
    table = _block_table(case)
    num_blocks = int(table.max()) + 2  # one block of nothing but NaN
    tensors, dense = {}, []
    for name, dim in (("key", case.head_dim), ("value", v_dim)):
        rows = [torch.randn(n, case.num_kv_heads, dim).to(case.dtype) for n in case.lens]
        cache, scales = _pool(case, num_blocks, dim)
        for row, length in enumerate(case.lens):
            for pos in seen_positions(case, row, length):
                place = int(table[row, pos // case.block_size]), pos % case.block_size
                if scales is None:
                    cache[place] = rows[row][pos]
                else:
                    codes, scales[place] = quantize(rows[row][pos], cache.dtype)
                    cache.view(torch.uint8)[place] = codes.view(torch.uint8)
                    rows[row][pos] = dequantize(codes, scales[place], case.dtype)
        dense.append(rows)
        tensors |= {f"{name}_cache": cache} if scales is None else {f"{name}_cache": cache, f"{name}_scales": scales}
    tensors["query"] = _query(case)
    tensors |= {"block_table": table, "seq_lens": torch.tensor(case.lens, dtype=torch.int32)} | _extras(case)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    own = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
    extras = {name: x for name, x in tensors.items() if name not in own}
    return Inputs(case, *(tensors[name] for name in own), *dense, extras)


def _query(case: Case) -> torch.Tensor:
    shape = (1, sum(case.q_lens)) if case.q_lens else (len(case.lens), case.q_len)
    return torch.randn(*shape, case.num_heads, case.head_dim).to(case.dtype).transpose(1, 2)


def _extras(case: Case) -> dict[str, torch.Tensor]:
    extras = {}
    if case.q_lens:
        extras["cu_seqlens_q"] = torch.tensor([0, *case.q_lens]).cumsum(0).int()
    if case.sinks:
        extras["sinks"] = torch.randn(case.num_heads).to(case.dtype)
    if case.alibi:
        extras["alibi_slopes"] = torch.rand(case.num_heads)
    if case.bias:
        extras["position_bias"] = torch.randn(case.bias, case.num_heads, case.q_len, max(case.lens)).to(case.dtype)
    if case.starts:
        extras["kv_starts"] = torch.tensor(case.starts, dtype=torch.int32)
    return extras


def _double(x: torch.Tensor) -> torch.Tensor:
    x = x.cpu()
    return x.double() if x.is_floating_point() and x.dtype not in LARGEST else x


def seen_range(case: Case, row: int, pos: int) -> range:
    """The keys that a query at position `pos` of a row sees: the contract's words, written down once more."""
    first = case.starts[row] if case.starts else 0
    if case.window is not None:
        first = max(first, pos - case.window + 1)
    if case.chunk is not None:
        first = max(first, pos // case.chunk * case.chunk)
    return range(first, pos + 1)


def seen_positions(case: Case, row: int, length: int) -> range:
    """The keys that any of the row's queries sees. They are contiguous, since each query sees its own position."""
    if length == 0 or case.new_tokens[row] == 0:
        return range(0)
    return range(seen_range(case, row, max(length - case.new_tokens[row], 0)).start, length)


def _block_table(case: Case) -> torch.Tensor:
    """int32 `[batch, max_blocks]`: distinct blocks in random order, -1 where nothing is seen."""
    max_blocks = -(-max(case.lens) // case.block_size) + case.spare_blocks
    table = torch.full((len(case.lens), max_blocks), -1, dtype=torch.int32)
    used = []
    for row, length in enumerate(case.lens):
        used += [(row, i) for i in sorted({pos // case.block_size for pos in seen_positions(case, row, length)})]
    for (row, i), block in zip(used, torch.randperm(len(used)), strict=True):
        table[row, i] = block
    return table


def _pool(case: Case, num_blocks: int, dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NaN-filled `[num_blocks, block_size, num_kv_heads, dim]` whose strides are those of `case.layout`, and scales."""
    blocks, slots, heads = num_blocks, case.block_size, case.num_kv_heads
    storage = {  # layout: shape in memory, and how to get from it to blocks, slots, heads, dim
        "NHD": ((blocks, slots, heads, dim), lambda x: x),
        "HND": ((blocks, heads, slots, dim), lambda x: x.transpose(1, 2)),
        "packed": ((blocks, 2, heads, slots, dim), lambda x: x[:, 1].transpose(1, 2)),
        "head_major": ((heads, blocks, slots, dim), lambda x: x.permute(1, 2, 0, 3)),
        "odd": ((blocks, slots, heads, dim + 1), lambda x: x[..., 1:]),  # strides and base not divisible by anything
    }
    shape, view = storage[case.layout]
    if case.kv_dtype is None:
        return view(torch.full(shape, float("nan"), dtype=case.dtype)), None
    codes = torch.full(shape, 0x7F, dtype=torch.uint8).view(case.kv_dtype)  # NaN in e4m3; int8 has its scales
    scales = torch.full((*shape[:-1], 1), float("nan"))
    return view(codes), (view(scales) if case.layout != "odd" else scales)[..., 0]


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "_".join(map(str, value))
    return str(value).removeprefix("torch.")
