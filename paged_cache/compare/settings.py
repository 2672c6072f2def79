"""What is compared, and how long it may take."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..assets import MODEL_PATH
from ..errors import InvalidRequestError

NUM_NEW_WITHOUT_CACHE = 4
"""Most tokens that are generated without a cache: each of them costs as much as the first one."""
MOST_AT_ONCE = 1024
"""Rows of a batch, and requests at once: a thread, a prompt and an answer of the reference for each."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """All that a user may choose.

    Attributes:
        model: Id on the hub, or a folder.
        prompts: Texts; without any, pieces of Python's own library, or random tokens.
        max_new_tokens: Per prompt of the batch, and most per request of the second part.
        batch_size: Rows of the largest batch; 0 for as many as there are prompts.
        contexts: Tokens of the prompts whose latency is measured.
        concurrency: Numbers of requests that are served at once; empty to leave that part out.
        input_len: Tokens of the longest prompt, where prompts are not given; None for the usual ones, or fewer if the model
            reads no more.
        device, dtype, seed: Of the model, and of random tokens.
        rounds: That are timed.
        time_budget: Seconds that the measurements over the context may take.
        is_quick: Whether figures mean nothing: too few tokens and rounds.
    """

    model: str | Path = MODEL_PATH
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 32
    batch_size: int = 0
    contexts: tuple[int, ...] = (128, 512, 2048)
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    input_len: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    rounds: int = 3
    time_budget: float = 30.0
    is_quick: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidRequestError(f"the dtype is {self.dtype!r}; give one of {', '.join(DTYPES)}.")
        for name, least in {"max_new_tokens": 2, "batch_size": 0, "rounds": 1}.items():
            if getattr(self, name) < least:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; at least {least} is needed.")
        for name in ("contexts", "concurrency"):
            if any(value < 1 for value in getattr(self, name)):
                raise InvalidRequestError(f"{name} is {list(getattr(self, name))}; all have to be at least 1.")
        self._check_sizes()
        if empty := [text for text in self.prompts if not text.strip()]:
            raise InvalidRequestError(
                f"the prompt {empty[0]!r} is empty (--prompt, --prompts-file); give it some text."
            )

    def _check_sizes(self) -> None:
        """What would take memory or time without end."""
        if self.input_len is not None and self.input_len < 1:
            raise InvalidRequestError(f"input_len is {self.input_len}; at least 1 is needed.")
        if self.input_len is not None and self.prompts:
            raise InvalidRequestError(
                f"input_len is {self.input_len}, but prompts are given, which have lengths of their own: leave one of them out."
            )
        if not 0 <= self.time_budget < math.inf:
            raise InvalidRequestError(f"time_budget is {self.time_budget}; give seconds, at least 0.")
        for name, most in {"batch_size": self.rows, "concurrency": max(self.concurrency, default=0)}.items():
            if most > MOST_AT_ONCE:
                raise InvalidRequestError(f"{name} is {most}; at most {MOST_AT_ONCE} are compared.")

    @property
    def rows(self) -> int:
        """Of the largest batch."""
        return self.batch_size or len(self.prompts) or 8

    @property
    def num_requests(self) -> int:
        """Prompts that are needed."""
        return max([self.rows, *self.concurrency])

    @property
    def is_exact(self) -> bool:
        """Whether tokens have to be the same: in 16 bits, a padded batch rounds differently."""
        return self.dtype == "float32"

    def to_json(self) -> dict[str, Any]:
        """For `Results.settings`."""
        return asdict(self) | {
            "model": Path(self.model).name if Path(self.model) == MODEL_PATH else str(self.model),
            "num_new_without_cache": NUM_NEW_WITHOUT_CACHE,
        }


QUICK: dict[str, Any] = {
    "max_new_tokens": 6,
    "batch_size": 3,
    "contexts": (32, 64),
    "concurrency": (1, 3),
    "rounds": 1,
    "is_quick": True,
}
"""In seconds, with figures that say little."""


def make_settings(quick: bool, **chosen: Any) -> Settings:
    """Those that were chosen, where they are not None or empty; the others are the defaults, or those of `QUICK`."""
    unknown = chosen.keys() - {field.name for field in fields(Settings)}
    assert not unknown, f"no such settings: {unknown}"
    given = {name: value for name, value in chosen.items() if value not in (None, [], "")}
    base = dict(QUICK) if quick else {}
    if base and "prompts" in given:
        base["batch_size"] = 0
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Settings(**base | given | lists)
