"""The attention calls that are measured, and what each of them must read and compute at least."""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

EXTENT = 16
MEMORY_BOUND = 64 * 2**20  # K and V from here on cannot come from a CPU's caches


class Group(NamedTuple):
    """Neighbouring rows of a batch that are alike."""

    rows: int
    context: int
    q_len: int


@dataclass(frozen=True)
class Shape:
    """One call of attention.

    Attributes:
        section: What it is measured for: decode, prefill, …
        batch: Rows.
        context: Tokens of each row, the new ones included.
        q_len: New tokens of each row.
        heads, kv_heads, dim: Of queries; of keys and values; of each head.
        dtype: Of queries.
        kv_dtype: Of a quantised cache; None: as queries.
        block_size: Tokens per block.
        window: As in `paged_attention`.
        first: Context and new tokens of the first row, where it is not like the others.
        extent: Blocks of a row that lie side by side, on average; with 1 the order is random. `bench_allocation.py` counts
            them in a pool that serves requests.
    """

    section: str
    batch: int
    context: int
    q_len: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    block_size: int = 16
    window: int | None = None
    first: tuple[int, int] | None = None
    extent: int = EXTENT

    def __str__(self) -> str:
        first = f"1 x {self.first[0]} + " if self.first else ""
        new = f" q {self.first[1]}, {self.q_len}" if self.first else f" q {self.q_len}"
        window = f" window {self.window}" if self.window else ""
        rows = f"{first}{self.batch - bool(self.first)} x {self.context}{new if new != ' q 1' else ''}{window}"
        kind = self.kv_dtype or self.dtype
        order = {EXTENT: "", 1: " scattered"}.get(self.extent, f" extent {self.extent}")
        return f"{self.section} {kind} {self.heads}/{self.kv_heads}x{self.dim} b{self.block_size} {rows}{order}"

    @property
    def groups(self) -> list[Group]:
        """The rows, alike ones together."""
        rest = Group(self.batch - bool(self.first), self.context, self.q_len)
        return [Group(1, *self.first), rest] if self.first else [rest]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of queries, outputs and dense keys and values."""
        return named(self.dtype)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the blocks."""
        return named(self.kv_dtype or self.dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks that all rows fill."""
        return sum(group.rows * -(-group.context // self.block_size) for group in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """Of K and V, scales included."""
        scales = 4 if self.kv_dtype else 0
        return 2 * self.kv_heads * (self.dim * self.cache_dtype.itemsize + scales)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that some query sees, read once."""
        seen = sum(rows * min(context, self._reach + q_len - 1) for rows, context, q_len in self.groups)
        return seen * self.bytes_per_token

    @property
    def nbytes(self) -> int:
        """All that a call must move: `kv_bytes`, queries and outputs."""
        tokens = sum(group.rows * group.q_len for group in self.groups)
        return self.kv_bytes + 2 * tokens * self.heads * self.dim * self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        """Two products, over the pairs of query and key that are visible."""
        pairs = sum(
            rows * sum(min(p + 1, self._reach) for p in range(context - q_len, context))
            for rows, context, q_len in self.groups
        )
        return 4 * self.heads * self.dim * pairs

    @property
    def _reach(self) -> int:
        return self.window or 2**62


def named(dtype: str) -> torch.dtype:
    """torch's dtype of that name."""
    result = getattr(torch, dtype)
    assert isinstance(result, torch.dtype)
    return result


def cpu_shapes(quick: bool) -> list[Shape]:
    """Decode, prefill, chunks of a prompt over what is cached, and a packed batch of one chunk and decoding rows.

    Then the steps of a batcher. At the end the decode lines that come from memory once more, with blocks in random order:
    the worst case.
    """
    models = [Shape("", 1, 1, heads=h, kv_heads=k, dim=d) for h, k, d in ((8, 4, 64), (32, 8, 128), (8, 8, 64))]
    batches, contexts = [1, 8, 32], [128, 512, 2048, 8192]
    prompts, chunks = [128, 512, 2048], [(16, 2048), (64, 2048), (512, 2048), (512, 8192), (2048, 4096)]
    if quick:
        models, batches, contexts, prompts, chunks = models[:1], [1, 8], [128, 8192], [128], [(64, 512)]
    plain = [replace(model, dtype=dtype) for dtype in ("float32", "bfloat16") for model in models]
    codes = ("int8", "float8_e4m3fn")
    quantised = [replace(model, dtype="float32", kv_dtype=code) for code in codes for model in models[:2]]
    shapes = [
        replace(model, section="decode", batch=batch, context=context)
        for model in plain + quantised
        for batch, context in itertools.product(batches, contexts)
    ]
    large = [shape for shape in shapes if shape.kv_dtype is None and shape.kv_bytes >= MEMORY_BOUND]
    for model in (model for model in plain if model.heads > model.kv_heads):
        shapes += [replace(model, section="prefill", context=n, q_len=n) for n in prompts]
        shapes += [replace(model, section="chunk", context=n, q_len=q_len) for q_len, n in chunks]
        shapes.append(replace(model, section="mixed", batch=8, context=512, first=(512, 128)))
    shapes += step_shapes(models[0]) + ([] if quick else step_shapes(replace(models[0], heads=6, kv_heads=2, dim=32)))
    return shapes + [replace(shape, section="scattered", extent=1) for shape in large]


def step_shapes(model: Shape) -> list[Shape]:
    """Decoding rows, prompts and a chunk behind a prefix, as a batcher brings them, and decoding rows with one of these."""
    model = replace(model, section="step", dtype="float32")
    decode = replace(model, batch=32, context=200)
    prompts = [(256, 256), (512, 512), (512, 256)]
    return [
        decode,
        replace(model, batch=4, context=128, q_len=128),
        *(replace(model, context=context, q_len=q_len) for context, q_len in prompts),
        *(replace(decode, batch=33, first=prompt) for prompt in prompts),
    ]


def cuda_shapes(quick: bool) -> list[Shape]:
    """Llama-3-8B's layer in bfloat16 and blocks of 64, and one thing changed at a time."""

    def shape(section: str, batch: int, context: int, q_len: int = 1, **changes: object) -> Shape:
        return replace(Shape(section, batch, context, q_len, block_size=64), **changes)  # type: ignore[arg-type]

    k, usual = 1024, (64, 8 * 1024)
    sizes = list(itertools.product((1, 8, 64, 256), (k, 8 * k, 32 * k)))
    shapes = [shape("decode", *size) for size in sizes]
    for kv_dtype in ("float8_e4m3fn", "int8"):
        shapes += [shape("dtypes", *size, kv_dtype=kv_dtype) for size in [(1, 8 * k), *sizes[5:-1]]]
    shapes += [shape("ragged", 64, k, first=(32 * k, 1))]
    shapes += [shape("groups", *usual, heads=8 * group) for group in (1, 8, 16)]
    shapes += [shape("dims", *usual, dim=dim) for dim in (64, 80, 96, 256)]
    shapes += [shape("blocks", *usual, block_size=block_size) for block_size in (16, 256)]
    shapes += [shape("window", 8, 32 * k, window=4 * k), shape("window", 8, 4 * k)]
    shapes += [shape("prefill", 1, n, n) for n in (512, 2 * k, 8 * k, 32 * k)]
    shapes += [shape("chunk", 1, 32 * k, 512)]
    shapes += [shape("verify", batch, 8 * k, q_len) for batch in (1, 8) for q_len in (4, 8)]
    shapes += [shape("mixed", 64, 4 * k, first=(8 * k, 512))]
    if quick:
        shapes = [
            next(x for x in shapes if x.section == section) for section in dict.fromkeys(s.section for s in shapes)
        ]
    return shapes


def shrink(shape: Shape) -> Shape:
    """The same, small enough for a rehearsal on a CPU."""
    first = shape.first and (shape.first[0] // 64, -(-shape.first[1] // 64))
    small = replace(shape, batch=min(shape.batch, 3), context=max(shape.context // 64, 8), first=first)
    heads = max(1, shape.heads // 8), max(1, shape.kv_heads // 8)
    q_len = shape.q_len if shape.q_len <= 8 else -(-shape.q_len // 64)
    return replace(small, heads=heads[0], kv_heads=heads[1], q_len=q_len, window=shape.window and shape.window // 64)
