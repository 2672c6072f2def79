"""transformers' own beam search over forked rows: its loop runs in a thread and waits where it would call the model."""

import copy
import threading
import weakref
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import PagedCacheError
from .decoding import is_late, read_criteria, start_clocks
from .exchange import Closed, Exchange
from .preparing import Prepared
from .request import Row
from .shadow import shadow

PATIENCE = 600.0
"""Seconds that the loop may take for one token; longer means that a processor of its hangs."""

_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def is_beam_search() -> bool:
    """Whether a beam search calls this: a processor of its, inside a step."""
    return threading.current_thread() in _threads


class Turn(NamedTuple):
    """What the rows do next: row `i` goes on from row `parents[i]` with `tokens[i]`."""

    parents: list[int]
    tokens: list[int]


class BeamSearch:
    """The beams of one request; see `request.Search`.

    Args:
        model: Whose `_beam_search` runs.
        prepared: The request as `generate` understands it.
        generator: Where random numbers come from, for sampling among beams.

    Attributes:
        sequences_scores, scores, logits: As `generate` returns them, if they were asked for.
    """

    streamer = None

    def __init__(self, model: PreTrainedModel, prepared: Prepared, generator: torch.Generator | None) -> None:
        self.prompt_ids: list[int] = prepared.input_ids[0].tolist()
        self.num_rows = len(prepared.input_ids)
        self.max_length, self._eos_ids, self._criteria = read_criteria(prepared.criteria)
        self.max_new_tokens = max(self.max_length - len(self.prompt_ids), 1)
        self.rows: list[Row] = []
        self.reasons: list[str | None] = [None]
        self.sequences_scores: torch.Tensor | None = None
        self.scores: Any = None
        self.logits: Any = None
        self._prepared, self._generator = prepared, generator
        self._cache, self._randomness = _BeamCache(), _Randomness(generator)
        self._shadow = shadow(model, __call__=self._forward, _reorder_cache=_reorder)
        self._exchange = Exchange()
        self._thread = threading.Thread(target=self._run, name="paged-cache-beam-search", daemon=True)
        self._num_accepted = self._num_answered = 0
        self._found: list[list[int]] = []
        _threads.add(self._thread)

    @property
    def is_complete(self) -> bool:
        """Whether the search is over."""
        return None not in self.reasons

    def sequences(self) -> list[list[int]]:
        """Generated tokens of each returned sequence, the best first; of all beams while the search goes on."""
        return self._found or [row.tokens[len(self.prompt_ids) :] for row in self.rows]

    def begin(self) -> None:
        """The first token is about to be computed: from here on `max_time` counts."""
        start_clocks(self._criteria)

    def advance(self, logits: torch.Tensor) -> Turn | None:
        """Lets the loop choose; says the same again until it is accepted.

        The engine waits meanwhile, with all its requests: up to `PATIENCE` if a processor of this one hangs.

        Args:
            logits: `[num_rows, vocab_size]` behind each row's last token.

        Returns:
            What the rows do next; None if the search is over.

        Raises:
            Exception: What the loop raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        try:
            turn: Turn | Exception | None = self._exchange.ask(self._num_accepted, logits, PATIENCE)
        except TimeoutError:
            raise PagedCacheError(f"the beam search took longer than {PATIENCE:.0f} s for one token.") from None
        if isinstance(turn, Exception):
            raise turn
        return turn

    def accept(self, turn: Turn, rows: list[Row]) -> None:
        """Goes on with `rows`, which `turn.parents` name, and a token more on each; all or nothing."""
        lengths = [len(row.tokens) for row in rows]
        before, number = self.rows, self._num_accepted
        try:
            for row, token in zip(rows, turn.tokens, strict=True):
                row.tokens.append(token)
            self.rows, self._num_accepted = rows, number + 1
        except BaseException:
            self.rows, self._num_accepted = before, number
            for row, length in zip(rows, lengths, strict=True):
                del row.tokens[length:]
            raise

    def close(self) -> None:
        """Ends the loop, wherever it is."""
        self._exchange.close()

    def _run(self) -> None:
        prepared = self._prepared
        config = copy.copy(prepared.config)
        config.return_dict_in_generate = True
        kwargs = {**prepared.model_kwargs, "past_key_values": self._cache, "use_cache": True}
        try:
            self._exchange.question(0)
            self._randomness.swap()
            with torch.no_grad():
                output = type(self._shadow)._beam_search(
                    self._shadow,
                    prepared.input_ids,
                    logits_processor=prepared.processors,
                    stopping_criteria=prepared.criteria,
                    generation_config=config,
                    **kwargs,
                )
            self._read(output)
            self._hand_over(None)
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001 (it is raised where the engine waits)
            self._hand_over(error)
        except BaseException as error:  # noqa: BLE001 (the loop is over, and so is its request)
            self._hand_over(PagedCacheError(f"the beam search was left by {type(error).__name__}."))

    def _hand_over(self, turn: Turn | Exception | None) -> None:
        """The engine goes on; the global random numbers are everybody's again."""
        self._randomness.swap()
        self._num_answered += 1
        self._exchange.answer(self._num_answered - 1, turn)

    def _forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """Stands in the place of the model: asks the engine for the logits behind `input_ids`."""
        is_first = self._cache.length == 0  # its logits are there already
        self._cache.length += input_ids.shape[1]
        if not is_first:
            self._hand_over(Turn(self._cache.take_parents(self.num_rows), input_ids[:, -1].tolist()))
        logits = self._exchange.question(self._num_answered)
        if not is_first:
            self._randomness.swap()
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self._cache)

    def _read(self, output: Any) -> None:
        lengths = (output.beam_indices >= 0).sum(-1).tolist()
        start = len(self.prompt_ids)
        self._found = [
            ids[start : start + length] for ids, length in zip(output.sequences.tolist(), lengths, strict=True)
        ]
        self.sequences_scores, self.scores, self.logits = output.sequences_scores, output.scores, output.logits
        self.reasons = [self._reason(ids) for ids in self._found]

    def _reason(self, ids: list[int]) -> str:
        """Why a sequence ended. `max_time` cuts those that have a token of the last turn."""
        length = len(self.prompt_ids) + len(ids)
        if length >= self.max_length:
            return "length"
        is_cut = length > self._cache.length and ids[-1] not in self._eos_ids
        return "timeout" if is_cut and is_late(self._criteria) else "stop"


class _BeamCache(DynamicCache):
    """Knows how long the rows are and from which each goes on; the engine has their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self._parents: list[int] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._parents = beam_idx.tolist()

    def take_parents(self, num_rows: int) -> list[int]:
        """Since the last time."""
        parents, self._parents = self._parents, None
        return parents if parents is not None else list(range(num_rows))


def _reorder(model: Any, cache: _BeamCache, beam_idx: torch.Tensor) -> _BeamCache:
    cache.reorder_cache(beam_idx)
    return cache


class _Randomness:
    """Puts a generator's state in the place of torch's global one, for code that knows no generator."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._is_cuda = generator is not None and generator.device.type == "cuda"

    def swap(self) -> None:
        """Mine for theirs, and back when it is called again."""
        if self._generator is None:
            return
        mine = self._generator.get_state()
        if self._is_cuda:
            self._generator.set_state(torch.cuda.get_rng_state(self._generator.device))
            torch.cuda.set_rng_state(mine, self._generator.device)
        else:
            self._generator.set_state(torch.get_rng_state())
            torch.set_rng_state(mine)
