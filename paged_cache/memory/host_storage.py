"""Host memory for the content of blocks that the pool evicted, and the time that copies take."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InvalidRequestError
from ..kernels import copy_blocks
from . import huge_pages
from .offload import HostTier
from .offload_costs import Stopwatch
from .storage import KVStorage

PORTABLE = 1
"""Flag of `cudaHostRegister`: the memory is pinned for all devices."""


class HostStorage:
    """A second storage, block by block like the pool's: for each slab one in host memory, pinned where the pool is on CUDA.

    Blocks come and go in one call for all layers of a device, scales included. On CUDA copies run on the current stream,
    behind what computed the blocks and before what reads them; nothing waits for them on the host.

    Args:
        storage: The pool's tensors.
        num_blocks: Host blocks.

    Raises:
        InvalidRequestError: So much memory cannot be pinned.
    """

    def __init__(self, storage: KVStorage, num_blocks: int) -> None:
        self._storage, self.num_blocks = storage, num_blocks
        self._last: dict[torch.device, torch.cuda.Event] = {}
        self._allocate()

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs, scales included."""
        return sum(slab.nbytes for slabs in self._slabs.values() for slab in slabs)

    @property
    def slabs(self) -> list[torch.Tensor]:
        """`[num_blocks, ...]` each."""
        return [slab for slabs in self._slabs.values() for slab in slabs]

    def save(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks of the pool, `(block, host block)` each."""
        if self._layout is not self._storage.layout:  # the pool was laid out again, and forgot all host blocks
            self._allocate()
        for device, slabs in self._storage.slabs.items():
            self._copy(device, slabs, self._slabs[device], pairs)

    def load(self, pairs: list[tuple[int, int]]) -> None:
        """Copies blocks back, `(host block, block)` each."""
        for device, slabs in self._storage.slabs.items():
            self._copy(device, self._slabs[device], slabs, pairs)

    def _copy(
        self,
        device: torch.device,
        sources: list[torch.Tensor],
        destinations: list[torch.Tensor],
        pairs: list[tuple[int, int]],
    ) -> None:
        if device.type != "cuda":
            copy_blocks(sources, destinations, torch.tensor(pairs, device=device))
            return
        stream = torch.cuda.current_stream(device)
        if device in self._last:  # another thread's stream may have written what this one reads
            stream.wait_event(self._last[device])
        with torch.cuda.device(device):
            copy_blocks(sources, destinations, torch.tensor(pairs, device=device))
        self._last[device] = stream.record_event()

    def _allocate(self) -> None:
        self._layout = self._storage.layout
        self._slabs = {
            device: [_empty((self.num_blocks, *slab.shape[1:]), slab.dtype, device) for slab in slabs]
            for device, slabs in self._storage.slabs.items()
        }


class CudaStopwatch(Stopwatch):
    """Measures what the current stream of a device does, without waiting for it.

    `tell` is called with the seconds when a later measurement begins and the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Callable[[float], None]]] = deque()

    def start(self) -> Any:
        """A mark for `stop`."""
        while self._pending and self._pending[0][1].query():
            begin, end, tell = self._pending.popleft()
            tell(begin.elapsed_time(end) / 1000)
        return self._record()

    def stop(self, mark: Any, tell: Callable[[float], None]) -> None:
        """Tells the seconds since `mark`, later."""
        self._pending.append((mark, self._record(), tell))

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def attach(tier: HostTier, storage: KVStorage) -> HostStorage:
    """Gives a tier the memory for its blocks."""
    host = HostStorage(storage, tier.num_blocks)
    tier.on_save, tier.on_load = host.save, host.load
    cuda = next((device for device in storage.slabs if device.type == "cuda"), None)
    if cuda is not None:
        tier.stopwatch = CudaStopwatch(cuda)
    return host


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # as the pool's slabs
        slab = huge_pages.empty(shape, dtype)
    if device.type == "cuda" and slab.nbytes:
        _pin(slab)
    return slab


def _pin(slab: torch.Tensor) -> None:
    """Pins memory in place: torch's own pinned tensors take up to twice what they hold."""
    cuda: Any = torch.cuda.cudart()
    status = int(cuda.cudaHostRegister(slab.data_ptr(), slab.nbytes, PORTABLE))
    if status:
        raise InvalidRequestError(
            f"{slab.nbytes} bytes of host memory cannot be pinned (CUDA error {status}): give less offload_memory, or raise "
            "the limit on locked memory (ulimit -l)."
        )
    weakref.finalize(slab, cuda.cudaHostUnregister, slab.data_ptr())
