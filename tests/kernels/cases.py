"""Random paged attention calls whose unused memory is poisoned: the inputs of all kernel tests."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes and features of one attention call. `str(case)` lists what differs from the defaults and names a test."""

    lens: tuple[int, ...] = (37, 1, 130, 0)  # below, in and far beyond the first tile of 64; a row of padding
    q_len: int = 1
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
    gain: float = 1.0  # factor on the scores
    spare_blocks: int = 2  # unused columns at the end of the block table
    num_splits: int | None = None  # None: what the kernel chooses

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{name}={_short(value)}" for name, value in changed) or "default"


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case. `keys[b]`, `values[b]` are row b's dense `[len, num_kv_heads, dim]`, what the pool holds."""

    case: Case
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    sinks: torch.Tensor | None
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def options(self) -> dict:
        """Keyword arguments of the call."""
        case = self.case
        return {
            "scale": case.gain * case.head_dim**-0.5,
            "window": case.window,
            "chunk": case.chunk,
            "softcap": case.softcap,
            "sinks": self.sinks,
        }

    def run(self, kernel: Kernel) -> torch.Tensor:
        """The output of `kernel` on these tensors."""
        tensors = (self.query, self.key_cache, self.value_cache, self.block_table, self.seq_lens)
        return kernel(*tensors, **self.options)

    def double(self) -> "Inputs":
        """The same numbers in float64, on the CPU: what the reference is given to be exact."""
        names = ("query", "key_cache", "value_cache", "sinks")
        wide = {name: None if (x := getattr(self, name)) is None else x.cpu().double() for name in names}
        return replace(self, **wide, block_table=self.block_table.cpu(), seq_lens=self.seq_lens.cpu())


def build(case: Case, device: str = "cpu") -> Inputs:
    """Random tensors for `case`: slots that no query sees hold NaN, table entries that no query needs are -1."""
    torch.manual_seed(0)
    v_dim = case.v_head_dim or case.head_dim
    keys = [torch.randn(n, case.num_kv_heads, case.head_dim).to(case.dtype) for n in case.lens]
    values = [torch.randn(n, case.num_kv_heads, v_dim).to(case.dtype) for n in case.lens]
    table = _block_table(case)
    num_blocks = int(table.max()) + 2  # one block of nothing but NaN
    key_cache = _pool(case, num_blocks, case.head_dim)
    value_cache = _pool(case, num_blocks, v_dim)
    for row, length in enumerate(case.lens):
        for pos in (p for p in range(length) if p in seen_positions(case, length)):
            block, offset = int(table[row, pos // case.block_size]), pos % case.block_size
            key_cache[block, offset] = keys[row][pos]
            value_cache[block, offset] = values[row][pos]
    num_heads = case.num_kv_heads * case.group
    query = torch.randn(len(case.lens), case.q_len, num_heads, case.head_dim).to(case.dtype).transpose(1, 2)
    sinks = torch.randn(num_heads).to(case.dtype) if case.sinks else None
    seq_lens = torch.tensor(case.lens, dtype=torch.int32)
    tensors = (x if x is None else x.to(device) for x in (query, key_cache, value_cache, table, seq_lens, sinks))
    return Inputs(case, *tensors, keys, values)


def seen_range(case: Case, pos: int) -> range:
    """The keys that a query at position `pos` sees: the contract's words, written down once more."""
    first = 0
    if case.window is not None:
        first = max(first, pos - case.window + 1)
    if case.chunk is not None:
        first = max(first, pos // case.chunk * case.chunk)
    return range(first, pos + 1)


def seen_positions(case: Case, length: int) -> range:
    """The keys that any of the row's queries sees. They are contiguous, since each query sees its own position."""
    if length == 0:
        return range(0)
    return range(seen_range(case, max(length - case.q_len, 0)).start, length)


def _block_table(case: Case) -> torch.Tensor:
    """int32 `[batch, max_blocks]`: distinct blocks in random order, -1 where nothing is seen."""
    max_blocks = -(-max(case.lens) // case.block_size) + case.spare_blocks
    table = torch.full((len(case.lens), max_blocks), -1, dtype=torch.int32)
    used = []
    for row, length in enumerate(case.lens):
        used += [(row, i) for i in sorted({pos // case.block_size for pos in seen_positions(case, length)})]
    for (row, i), block in zip(used, torch.randperm(len(used)), strict=True):
        table[row, i] = block
    return table


def _pool(case: Case, num_blocks: int, dim: int) -> torch.Tensor:
    """NaN-filled `[num_blocks, block_size, num_kv_heads, dim]` whose strides are those of `case.layout`."""
    blocks, slots, heads = num_blocks, case.block_size, case.num_kv_heads
    storage = {  # layout: shape in memory, and how to get from it to blocks, slots, heads, dim
        "NHD": ((blocks, slots, heads, dim), lambda x: x),
        "HND": ((blocks, heads, slots, dim), lambda x: x.transpose(1, 2)),
        "packed": ((blocks, 2, heads, slots, dim), lambda x: x[:, 1].transpose(1, 2)),
        "head_major": ((heads, blocks, slots, dim), lambda x: x.permute(1, 2, 0, 3)),
        "odd": ((blocks, slots, heads, dim + 1), lambda x: x[..., 1:]),  # strides and base not divisible by anything
    }
    shape, view = storage[case.layout]
    return view(torch.full(shape, float("nan"), dtype=case.dtype))


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "_".join(map(str, value))
    return str(value).removeprefix("torch.")
