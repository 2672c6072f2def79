"""What memory the devices of this machine have, and what of it is free."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Where Linux says what a group of processes, such as a container or a batch job, may use: by the controller in the list of a
process's groups the folder, the files with limit and use, and what `memory.stat` calls files that the system would drop. Version 2 has
no name, version 1 has."""

GROUPS_OF_PROCESS = Path("/proc/self/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`: on the CPU no more than a container or batch job is allowed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *(max(limit - used, 0) for limit, used in _groups())])


def total_memory(device: torch.device) -> int | None:
    """Bytes that `device` has, used or not, with swap space on the CPU; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    limits = [int(psutil.virtual_memory().total), *(limit for limit, _ in _groups())]
    return min(limits) + int(psutil.swap_memory().total)


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of all groups around this process that have a limit; in a container the outermost is its own."""
    for line in _lines(GROUPS_OF_PROCESS):
        controllers, _, path = line.partition(":")[2].partition(":")
        for controller in {"memory", ""} & set(controllers.split(",")):
            root, *names = CGROUPS[controller]
            inner = Path(root) / path.strip("/")
            for folder in [inner, *(outer for outer in inner.parents if outer.is_relative_to(root))]:
                if (found := _read_group(folder, *names)) is not None:
                    yield found


def _read_group(folder: Path, limit: str, usage: str, reclaimable: str) -> tuple[int, int] | None:
    try:
        stat = dict(line.split() for line in _lines(folder / "memory.stat"))
        used = int((folder / usage).read_text()) - int(stat.get(reclaimable, 0))
        return int((folder / limit).read_text()), used
    except (OSError, ValueError):  # the root, or "max"
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
