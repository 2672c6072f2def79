"""What requests ask for: lengths of a trace, random ones, repeated prefixes, or texts of a file; as `vllm bench` has them."""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InvalidRequestError
from ..workload import Workload, make_workload

NAMES = ("trace", "random", "prefix_repetition", "sharegpt", "custom")
TEXTS = ("sharegpt", "custom")
OPTIONS = {
    "trace": ("factor",),
    "random": ("random_",),
    "prefix_repetition": ("prefix_repetition_",),
    "sharegpt": ("sharegpt_", "dataset_path"),
    "custom": ("custom_", "skip_chat_template", "dataset_path"),
}
"""How the names of a dataset's own options begin."""
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048
"""Tokens: conversations of ShareGPT with a prompt or an answer below or above are left out, as vLLM does."""
Requests = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Dataset:
    """Options of `vllm bench` have its names; `factor` is ours.

    Attributes:
        dataset_name: One of `NAMES`; "trace" has the lengths of Azure's conversations of 2023.
        num_prompts: Requests; where a file has fewer, it is used again from its start.
        dataset_path: "sharegpt": a JSON list with `conversations`; "custom": lines of JSON with `prompt`.
        factor: Lengths of the trace are divided by it.
        random_range_ratio: Lengths lie evenly between (1 - ratio) and (1 + ratio) times what they should be.
        sharegpt_output_len: Instead of the length of the answer in the file.
        custom_output_len: -1 for the file's own `output_tokens`.
        skip_chat_template: Whether texts of "custom" are prompts as they are, and not what a user says.

    Raises:
        InvalidRequestError: An option makes no sense.
    """

    dataset_name: str = "trace"
    num_prompts: int = 64
    dataset_path: Path | None = None
    factor: float = 5.0
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    sharegpt_output_len: int | None = None
    custom_output_len: int = 256
    skip_chat_template: bool = False

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.dataset_name not in NAMES:
            raise InvalidRequestError(f"dataset_name {self.dataset_name!r}: there are {', '.join(NAMES)}.")
        positive = [name for name, value in vars(self).items() if name in ONE_AT_LEAST and value < 1]
        if positive:
            raise InvalidRequestError(f"{positive[0]} is {getattr(self, positive[0])}; it has to be 1 at least.")
        if not 0 < self.factor < math.inf:
            raise InvalidRequestError(f"factor is {self.factor}; it has to be above 0, and a number.")
        if not 0 <= self.random_range_ratio < 1:
            raise InvalidRequestError(f"random_range_ratio is {self.random_range_ratio}; it lies between 0 and 1.")
        if self.needs_tokenizer:
            self._require_file()

    @classmethod
    def of(cls, dataset_name: str, **options: Any) -> "Dataset":
        """With the options that somebody gave.

        Raises:
            InvalidRequestError: One of them belongs to another dataset, or makes no sense.
        """
        for name in options:
            owners = [owner for owner, prefixes in OPTIONS.items() if name.startswith(prefixes)]
            if owners and dataset_name in NAMES and dataset_name not in owners:
                raise InvalidRequestError(
                    f"{name} is an option of {' and '.join(owners)}, and dataset_name is {dataset_name}: leave it out."
                )
        return cls(dataset_name, **options)

    def _require_file(self) -> None:
        if self.dataset_path is None:
            raise InvalidRequestError(f"{self.dataset_name} is read from a file: give --dataset-path FILE.")
        if not self.dataset_path.is_file():
            what = "is no file" if self.dataset_path.exists() else "does not exist"
            raise InvalidRequestError(f"dataset_path {self.dataset_path} {what}.")

    @property
    def needs_tokenizer(self) -> bool:
        """Whether it consists of texts."""
        return self.dataset_name in TEXTS

    def settings(self) -> dict[str, Any]:
        """Those that mean something for this dataset."""
        prefixes = ("dataset_name", "num_prompts", *OPTIONS[self.dataset_name])
        chosen = {k: v for k, v in asdict(self).items() if k.startswith(prefixes)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}

    def make(self, vocab_size: int, num_shared: int, seed: int, tokenizer: Any = None) -> Workload:
        """The requests; `num_shared` more tokens, the same for all, go before each prompt.

        Raises:
            InvalidRequestError: The file has no request that can be used.
        """
        if self.dataset_name == "trace":
            return make_workload(self.num_prompts, self.factor, vocab_size, num_shared, seed)
        rng = random.Random(seed)
        system = _tokens(rng, vocab_size, num_shared)
        try:
            requests = getattr(self, f"_{self.dataset_name}")(rng, vocab_size, tokenizer)
        except (KeyError, TypeError) as error:
            raise InvalidRequestError(f"{self.dataset_path} is no file for {self.dataset_name}: {error!r}") from error
        chosen = [requests[i % len(requests)] for i in range(self.num_prompts)]
        return Workload([system + prompt for prompt, _ in chosen], [num_new for _, num_new in chosen], num_shared)

    def _random(self, rng: random.Random, vocab_size: int, _: Any) -> Requests:
        def length(mean: int) -> int:
            few, many = mean * (1 - self.random_range_ratio), mean * (1 + self.random_range_ratio)
            return rng.randint(max(1, int(few)), max(1, int(many)))

        lengths = [(length(self.random_input_len), length(self.random_output_len)) for _ in range(self.num_prompts)]
        return [(_tokens(rng, vocab_size, prompt), num_new) for prompt, num_new in lengths]

    def _prefix_repetition(self, rng: random.Random, vocab_size: int, _: Any) -> Requests:
        count, length = self.prefix_repetition_num_prefixes, self.prefix_repetition_prefix_len
        prefixes = [_tokens(rng, vocab_size, length) for _ in range(count)]
        suffixes = [_tokens(rng, vocab_size, self.prefix_repetition_suffix_len) for _ in range(self.num_prompts)]
        prompts = [prefixes[i % count] + suffix for i, suffix in enumerate(suffixes)]
        rng.shuffle(prompts)
        return [(prompt, self.prefix_repetition_output_len) for prompt in prompts]

    def _sharegpt(self, rng: random.Random, _: int, tokenizer: Any) -> Requests:
        turns = [entry["conversations"] for entry in self._read(json.loads) if len(entry["conversations"]) >= 2]
        rng.shuffle(turns)
        found: Requests = []
        for question, answer, *_ in turns:
            prompt, tokens = (tokenizer(turn["value"])["input_ids"] for turn in (question, answer))
            num_new = self.sharegpt_output_len or len(tokens)
            is_short = len(prompt) < SHORTEST or (self.sharegpt_output_len is None and num_new < SHORTEST)
            if not is_short and len(prompt) <= LONGEST_PROMPT and len(prompt) + num_new <= LONGEST:
                found.append((prompt, num_new))
            if len(found) == self.num_prompts:
                break
        return self._some(found)

    def _custom(self, rng: random.Random, _: int, tokenizer: Any) -> Requests:
        entries = self._read(lambda text: [json.loads(line) for line in text.splitlines() if line.strip()])
        rng.shuffle(entries)
        is_chat = not self.skip_chat_template and tokenizer.chat_template
        found: Requests = []
        for entry in entries[: self.num_prompts]:
            text = entry["prompt"]
            if is_chat:
                talk = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
            found.append((ids, entry["output_tokens"] if self.custom_output_len == -1 else self.custom_output_len))
        return self._some([(ids, num_new) for ids, num_new in found if ids])

    def _read(self, parse: Any) -> list[Any]:
        assert self.dataset_path is not None
        try:
            return list(parse(self.dataset_path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InvalidRequestError(f"{self.dataset_path} is no file for {self.dataset_name}: {error}") from error

    def _some(self, found: Requests) -> Requests:
        if not found:
            raise InvalidRequestError(f"{self.dataset_path} has no request of a usable length.")
        return found


ONE_AT_LEAST = {
    name
    for name in Dataset.__dataclass_fields__
    if name.endswith(("_input_len", "random_output_len", "repetition_output_len", "suffix_len", "prefixes", "_prompts"))
}


def _tokens(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return rng.choices(range(1, vocab_size), k=count)
