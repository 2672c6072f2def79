"""What is free on a machine or in a container, and pools that ask for more."""

import logging
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from paged_cache import BlockPool, ContinuousBatcher, machine_memory, sizes
from paged_cache.errors import InvalidRequestError
from tests.models import model

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the machine has: in all, swap space, free."""
    monkeypatch.setattr(machine_memory, "GROUPS_OF_PROCESS", Path("/nowhere"))
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()

    def has(total: int, free: int, of_swap: int = 0) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=total, available=free))
        monkeypatch.setattr(psutil, "swap_memory", lambda: swap._replace(total=of_swap))

    return has


def write_group(folder: Path, version: int, limit: str, used: int, inactive: int) -> None:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, usage_file, name = machine_memory.CGROUPS["" if version == 2 else "memory"][1:]
    (folder / limit_file).write_text(limit + "\n")
    (folder / usage_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{name} {inactive}\n")


@pytest.mark.parametrize("asked", [{"memory": "9000TiB"}, {"num_blocks": 10**9}, {"memory": 5 * GIB}])
def test_more_than_the_machine_has_is_refused(machine: Callable[..., None], asked: dict) -> None:
    """The error names what was asked, what there is and what is free, and what to do; nothing is allocated."""
    machine(total=4 * GIB, free=2 * GIB)
    with pytest.raises(InvalidRequestError, match=r"of cpu for blocks; it has 4 GiB, 2 GiB free: .* memory=0\.5"):
        BlockPool.for_model(model("llama"), **asked)


def test_host_memory_counts_with_the_pool(machine: Callable[..., None]) -> None:
    """On the CPU the pool and what it offloads to share one memory: each fits, both do not."""
    machine(total=4 * GIB, free=4 * GIB)
    BlockPool.for_model(model("llama"), memory="3GiB")
    with pytest.raises(InvalidRequestError, match=r"would take 6 GiB of cpu"):
        BlockPool.for_model(model("llama"), memory="3GiB", offload_memory="3GiB")


def test_more_than_is_free_is_a_warning(machine: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """Others may give memory back before blocks are written, and swap space may take them: the pool is made."""
    machine(total=2 * GIB, free=GIB // 2, of_swap=GIB)
    with caplog.at_level(logging.WARNING, logger="paged_cache"):
        BlockPool.for_model(model("llama"), memory="256MiB")
        assert not caplog.records
        pool = BlockPool.for_model(model("llama"), memory="2.5GiB")
    assert pool.nbytes > 2 * GIB
    assert "2.5 GiB of cpu for blocks; it has 3 GiB, 512 MiB free" in caplog.text


def test_unknown_devices_are_left_to_torch(machine: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """Nobody says what a device of another kind has: nothing is refused for it, or warned of."""
    machine(total=GIB, free=GIB)
    assert machine_memory.total_memory(torch.device("meta")) is None
    with caplog.at_level(logging.WARNING, logger="paged_cache"):
        sizes.require_room({torch.device("meta"): GIB}, 1000, 0)
    assert not caplog.records


@pytest.mark.parametrize(("version", "line"), [(2, "0::/jobs/mine"), (1, "4:cpu,memory:/jobs/mine")])
@pytest.mark.parametrize("where", [".", "jobs", "jobs/mine"])
def test_a_container_has_less_than_the_machine(
    where: str, version: int, line: str, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The limit of any group around the process is what there is; files that the system would drop count as free."""
    machine(total=64 * GIB, free=60 * GIB, of_swap=GIB)
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/jobs\n{line}\n")
    root, controller = tmp_path / "root", "" if version == 2 else "memory"
    names = machine_memory.CGROUPS[controller][1:]
    monkeypatch.setattr(machine_memory, "GROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(machine_memory, "CGROUPS", {"": ("/nowhere", *names), controller: (str(root), *names)})
    assert machine_memory.free_memory(CPU) == 60 * GIB

    write_group(root / where, version, str(4 * GIB), used=3 * GIB, inactive=GIB)
    assert machine_memory.total_memory(CPU) == 5 * GIB
    assert machine_memory.free_memory(CPU) == 2 * GIB
    with pytest.raises(InvalidRequestError, match="it has 5 GiB, 2 GiB free"):
        BlockPool.for_model(model("llama"), memory="6GiB")

    write_group(root / where, version, "max", used=3 * GIB, inactive=0)
    assert machine_memory.free_memory(CPU) == 60 * GIB
    assert machine_memory.total_memory(CPU) == 65 * GIB


def test_trials_are_not_logged_as_pools(caplog: pytest.LogCaptureFixture) -> None:
    """A batcher tries its model on small pools, which are nobody's business, and leaves the pool as it was."""
    llama = model("llama")
    pool = BlockPool.for_model(llama, num_blocks=8)
    with caplog.at_level(logging.INFO, logger="paged_cache"), ContinuousBatcher(llama, pool) as batcher:
        assert batcher.stats().forward == "packed"
    assert "BlockPool" not in caplog.text
    assert pool.stats().allocated == 0
