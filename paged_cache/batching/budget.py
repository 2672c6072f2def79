"""How many tokens a step may have where memory ran out."""

from ..compat import logger

RECOVERY_STEPS = 16
"""After so many good steps the token budget that ran out of memory is doubled again."""


class Budget:
    """Halved when a step runs out of memory, and doubled again behind good steps.

    Args:
        most: Tokens in a step as configured.

    Attributes:
        limit: Tokens in the next step; None for as many as are configured.
    """

    def __init__(self, most: int) -> None:
        self._most, self._good_steps = most, 0
        self.limit: int | None = None

    @property
    def tokens(self) -> int:
        """Most tokens in the next step."""
        return self._most if self.limit is None else self.limit

    def use_less(self, count: int) -> None:
        """A step of so many tokens ran out of memory."""
        self.limit, self._good_steps = count // 2, 0
        logger.warning("out of memory with %d tokens in a step, trying %d", count, self.limit)

    def recover(self) -> None:
        """A step was good."""
        if self.limit is None:
            return
        self._good_steps += 1
        if self._good_steps >= RECOVERY_STEPS:
            self._good_steps, self.limit = 0, self.limit * 2
            if self.limit >= self._most:
                self.limit = None
