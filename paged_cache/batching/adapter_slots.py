"""How many different adapters run at once. Plain Python."""

from collections import Counter

from ..adapters import BASE
from .request import Request

NO_SLOT = (None, BASE)
"""What requests may have that need no adapter in a place of its own."""


class AdapterSlots:
    """Counts the adapters of running requests.

    Args:
        max_loras: Most different ones; None for any number.
    """

    def __init__(self, max_loras: int | None) -> None:
        self.max_loras = max_loras
        self._running: Counter[str] = Counter()

    def has_room(self, request: Request) -> bool:
        """Whether the request may run beside the others."""
        name = request.adapter_name
        return self.max_loras is None or name in NO_SLOT or name in self._running or len(self._running) < self.max_loras

    def take(self, request: Request) -> None:
        """The request runs."""
        name = request.adapter_name
        if name is not None and name not in NO_SLOT:
            self._running[name] += 1

    def give_back(self, request: Request) -> None:
        """The request runs no more."""
        name = request.adapter_name
        if name is not None and name not in NO_SLOT:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
