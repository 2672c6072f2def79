"""The tensors of a shape: blocks in runs of random lengths, what a dense cache would hold, and the right answer."""

from functools import cached_property
from typing import Any

import torch

from ...kernels import reference
from ...kernels.quantized import quantize
from ...memory.layout import LayerSpec, plan_layout
from ...memory.storage import KVStorage, LayerBlocks
from .shapes import Group, Shape

Pair = tuple[torch.Tensor, torch.Tensor]
SPAN = 32  # queries that are compared at once: the reference holds all their scores
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the norm of the right answer


class Problem:
    """Random tensors for one shape, in the layers of a real storage, which have one block table and are used in turn.

    Attributes:
        query: As `paged_attention` takes it, packed if the rows bring different numbers of tokens.
        storage: Blocks of all layers. One block more than the rows need is full of NaN.
        options: Keyword arguments of `paged_attention`, but for the scales, which are each layer's own.
    """

    def __init__(self, shape: Shape, device: str, num_layers: int) -> None:
        self.shape, self.device, self.num_layers = shape, torch.device(device), num_layers
        q_lens = [group.q_len for group in shape.groups for _ in range(group.rows)]
        lens = [group.context for group in shape.groups for _ in range(group.rows)]
        self.is_packed = len(set(q_lens)) > 1
        self.token_starts = [0, *torch.tensor(q_lens).cumsum(0).tolist()]
        rows = (1, sum(q_lens)) if self.is_packed else (shape.batch, shape.q_len)
        query = torch.randn(*rows, shape.heads, shape.dim, device=device).to(shape.torch_dtype)
        self.query = query.transpose(1, 2)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        self.block_table = self._table(lens)
        self.options: dict[str, Any] = {"scale": shape.dim**-0.5, "window": shape.window}
        if self.is_packed:
            cu_seqlens_q = torch.tensor(self.token_starts, dtype=torch.int32, device=device)
            self.options |= {"cu_seqlens_q": cu_seqlens_q, "max_q_len": max(q_lens)}
        spec = LayerSpec(None, shape.kv_heads, shape.dim, shape.kv_heads, shape.dim)
        layout, dtypes = plan_layout(dict.fromkeys(range(num_layers), spec)), (shape.torch_dtype, shape.cache_dtype)
        self.storage = KVStorage(layout, shape.num_blocks + 1, shape.block_size, dtypes[0], self.device, dtypes[1])
        for blocks in self.storage.layers.values():
            _fill(blocks.keys, blocks.key_scales)
            _fill(blocks.values, blocks.value_scales)

    def _table(self, lens: list[int]) -> torch.Tensor:
        """int32 `[batch, max_blocks]`: every block once, in runs in random order, -1 behind each row's end."""
        counts = [-(-length // self.shape.block_size) for length in lens]
        table = torch.full((len(lens), max(counts)), -1, dtype=torch.int32)
        for row, blocks in enumerate(_in_runs(counts, self.shape.extent).split(counts)):
            table[row, : len(blocks)] = blocks
        return table.to(self.device)

    def blocks(self, layer: int) -> LayerBlocks:
        """A layer's K and V."""
        return self.storage.layers[layer]

    def scales(self, layer: int) -> dict[str, torch.Tensor | None]:
        """A layer's scales as keyword arguments of `paged_attention`."""
        blocks = self.blocks(layer)
        return {"key_scales": blocks.key_scales, "value_scales": blocks.value_scales}

    @property
    def group_starts(self) -> list[int]:
        """Each group's first row."""
        return [0, 1] if self.shape.first else [0]

    def group_query(self, group: Group, start: int) -> torch.Tensor:
        """`[rows, heads, q_len, dim]`."""
        if not self.is_packed:
            return self.query[start : start + group.rows]
        tokens = self.query[0, :, self.token_starts[start] : self.token_starts[start + group.rows]]
        return tokens.view(-1, group.rows, group.q_len, self.shape.dim).transpose(0, 1)

    def slots(self, group: Group, start: int) -> torch.Tensor:
        """int64 `[rows * context]`, where the tokens of a group lie."""
        size = self.shape.block_size
        table = self.block_table[start : start + group.rows, : -(-group.context // size)].long()
        slots: torch.Tensor = table[..., None] * size + torch.arange(size, device=self.device)
        return slots.flatten(1)[:, : group.context].reshape(-1)

    def gather(self, layer: int, slots: torch.Tensor, group: Group) -> Pair:
        """K and V of a group, `[rows, kv_heads, context, dim]`, views of tokens side by side."""
        keys, values = self.storage.gather(layer, slots)
        keys, values = (x.unflatten(0, (group.rows, group.context)).transpose(1, 2) for x in (keys, values))
        return keys, values

    @cached_property
    def dense(self) -> list[list[Pair]]:
        """Per layer and group K and V without blocks, `[rows, kv_heads, context, dim]`.

        On the CPU contiguous, as in transformers' caches; on CUDA with tokens side by side, which flash attention takes too.
        """
        groups = [
            (group, self.slots(group, start)) for group, start in zip(self._groups, self.group_starts, strict=True)
        ]
        result = []
        for layer in range(self.num_layers):
            pairs = (self.gather(layer, slots, group) for group, slots in groups)
            is_cpu = self.device.type == "cpu"
            result.append(
                [(keys.contiguous(), values.contiguous()) if is_cpu else (keys, values) for keys, values in pairs]
            )
        return result

    @property
    def _groups(self) -> list[Group]:
        return self.shape.groups

    def error(self, output: torch.Tensor | list[torch.Tensor], layer: int) -> float:
        """How far an output is from the reference, of its norm: first and last rows, first and last queries.

        Args:
            output: As `paged_attention` returns it, or one `[rows, q_len, heads, dim]` for each group.
            layer: Of the forward, see `Candidate`.

        Returns:
            The largest error; NaN if anything in the output is NaN.
        """
        parts = output if isinstance(output, list) else self._split(output)
        errors = []
        for part, group, start in zip(parts, self._groups, self.group_starts, strict=True):
            query, count = self.group_query(group, start), min(SPAN, group.q_len)
            errors.append(torch.where(part.isnan().any(), float("nan"), 0.0))
            for row in {0, group.rows - 1}:
                for first in {0, group.q_len - count}:
                    tokens = slice(first, first + count)
                    right = self._right(query[row : row + 1, :, tokens], layer, start + row, group, tokens.stop)
                    errors.append((part[row : row + 1, tokens].float() - right).norm() / right.norm())
        return torch.stack(errors).max().item()

    def _split(self, output: torch.Tensor) -> list[torch.Tensor]:
        if not self.is_packed:
            return list(output.split([group.rows for group in self._groups]))
        tokens = output[0].split([group.rows * group.q_len for group in self._groups])
        return [part.unflatten(0, group[::2]) for part, group in zip(tokens, self._groups, strict=True)]

    def _right(self, query: torch.Tensor, layer: int, row: int, group: Group, last: int) -> torch.Tensor:
        """The reference for some queries of a row, as if the row ended with the last of them."""
        length, blocks = group.context - group.q_len + last, self.blocks(layer % self.num_layers)
        table = self.block_table[row : row + 1, : -(-length // self.shape.block_size)]
        lens = torch.tensor([length], dtype=torch.int32, device=self.device)
        options = {"scale": self.options["scale"], "window": self.shape.window, **self.scales(layer % self.num_layers)}
        return reference.paged_attention(query.float(), blocks.keys, blocks.values, table, lens, **options)


def _in_runs(counts: list[int], extent: int) -> torch.Tensor:
    """The blocks of all rows, one row behind the other: runs of consecutive ids, whose order in the pool is random.

    Lengths are geometrically distributed around `extent`; the end of a row cuts its last run short.
    """
    begins = torch.rand(sum(counts)) < 1 / extent
    begins[[0, *torch.tensor(counts).cumsum(0).tolist()[:-1]]] = True
    runs = begins.cumsum(0) - 1  # of each block
    places = torch.randperm(int(runs[-1]) + 1)[runs]
    return places.argsort(stable=True).argsort().int()  # the pool's order, turned around


def _fill(cache: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Random numbers, but NaN in the last block."""
    if scales is None:
        cache.normal_()
        cache[-1] = float("nan")
        return
    for part, factors in zip(cache.split(1024), scales.split(1024), strict=True):  # not all in float32 at once
        codes, scale = quantize(torch.randn(part.shape, device=part.device), cache.dtype)
        part.copy_(codes)
        factors.copy_(scale)
    scales[-1] = float("nan")


def needed_bytes(shape: Shape, num_layers: int, is_cpu: bool) -> int:
    """Memory that a problem and its candidates take at most, roughly."""
    dense = 2 * shape.kv_heads * shape.dim * shape.torch_dtype.itemsize  # per token
    copies = 3 if is_cpu and shape.section == "decode" else 1  # DynamicLayer's own, and the one that torch.cat makes
    work = dense + (8 * shape.kv_heads * shape.dim if shape.kv_dtype else 0)  # of a gather
    tokens = shape.num_blocks * shape.block_size
    return tokens * (num_layers * (shape.bytes_per_token + copies * dense) + work) + 4 * (shape.nbytes - shape.kv_bytes)
