"""What all measurements depend on: the machine, the versions of libraries, and the commit."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("paged-cache", "torch", "transformers", "triton", "numba", "peft", "accelerate")
CPU_INFO = Path("/proc/cpuinfo")


def environment(seed: int, device: str = "cpu") -> dict[str, Any]:
    """Device, threads, load of the machine, date, versions, commit (None outside a checkout) and seed.

    To be called before measuring: the load is that of the last minute, which should be somebody else's.
    """
    return {
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "seed": seed,
    }


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device != "cpu":
        return device
    return ", ".join(["cpu", platform.machine(), *_processor()])


def _processor() -> list[str]:
    """The processor's name where Linux tells it, and how many of its cores may be used."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return [*names[:1], f"{os.cpu_count()} cores"]


def _versions() -> dict[str, str]:
    found = {name: list(importlib.metadata.distributions(name=name)) for name in LIBRARIES}
    return {name: installed[0].version for name, installed in found.items() if installed}


def _commit() -> str | None:
    """Of the checkout that this file is part of; `-dirty` behind it if something else ran."""
    file = Path(__file__)
    if _git("ls-files", "--error-unmatch", file.name) is None:  # installed into somebody else's checkout, or none
        return None
    return _git("describe", "--always", "--dirty", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What it prints; None if it fails, or is not there."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
