"""What memory the devices of this machine have, and what of it is free."""

from pathlib import Path

import psutil
import torch

CGROUPS = {
    "/sys/fs/cgroup": ("memory.max", "memory.current", "inactive_file"),
    "/sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where Linux says what a container may use: the folder, the files with limit and use, and what `memory.stat` calls files
that the system would give back. Version 2, then version 1."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`: on the CPU no more than the container is allowed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *(max(limit - used, 0) for limit, used in _container())])


def total_memory(device: torch.device) -> int | None:
    """Bytes that `device` has, used or not, with swap space on the CPU; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    machine = int(psutil.virtual_memory().total) + int(psutil.swap_memory().total)
    return min([machine, *(limit for limit, _ in _container())])


def _container() -> list[tuple[int, int]]:
    """Limit and use in bytes of the container that this process runs in; empty if there is none, or no limit."""
    return [found for folder, names in CGROUPS.items() if (found := _read_group(Path(folder), *names)) is not None]


def _read_group(folder: Path, limit: str, usage: str, reclaimable: str) -> tuple[int, int] | None:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage).read_text()) - int(stat.get(reclaimable, 0))
        return int((folder / limit).read_text()), used
    except (OSError, ValueError):  # another version, or "max"
        return None
