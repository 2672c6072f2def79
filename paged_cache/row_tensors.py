"""What kernels ask of the rows of a cache, as tensors that are kept from step to step."""

import torch

from .memory.sequence import Sequence


class TableTensor:
    """Block tables of all rows in one group, on each device that asks; only rows that changed are written again."""

    def __init__(self) -> None:
        self._host = torch.zeros(0, 0, dtype=torch.int32)
        self._on: dict[torch.device, torch.Tensor] = {}
        self._versions: list[tuple[int, int]] = []

    def update(self, rows: list[Sequence], group: int, device: torch.device) -> torch.Tensor:
        """int32 `[rows, max_blocks]`; entries beyond a row's blocks and returned blocks are -1."""
        versions = [(id(row), row.version) for row in rows]
        if versions != self._versions:
            self._write(rows, group, versions)
        if device not in self._on:
            self._on[device] = self._host if device.type == "cpu" else self._host.to(device)
        return self._on[device]

    def _write(self, rows: list[Sequence], group: int, versions: list[tuple[int, int]]) -> None:
        self._on = {}
        width = max(len(row.tables[group]) for row in rows)
        if self._host.shape[0] != len(rows) or self._host.shape[1] < width:
            self._host = torch.full((len(rows), width + width // 4 + 4), -1, dtype=torch.int32)
            self._versions = []
        known = dict(enumerate(self._versions))
        table = self._host.numpy()
        for i, row in enumerate(rows):
            if known.get(i) != versions[i]:
                blocks = row.tables[group]
                table[i, : len(blocks)] = blocks
                table[i, len(blocks) :] = -1
        self._versions = versions


class LensTensor:
    """Tokens of all rows, the new ones included; on the host in one tensor, so that kernels find it where it was."""

    def __init__(self) -> None:
        self._host = torch.zeros(0, dtype=torch.int32)

    def update(self, rows: list[Sequence], device: torch.device) -> torch.Tensor:
        """int32 `[rows]`."""
        if len(self._host) != len(rows):
            self._host = torch.zeros(len(rows), dtype=torch.int32)
        self._host.numpy()[:] = [row.num_tokens for row in rows]
        return self._host if device.type == "cpu" else self._host.to(device)
