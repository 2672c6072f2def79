"""Output processing: logits of a step become tokens of requests, and requests come to their end."""

from collections.abc import Callable
from typing import Any, cast

import torch

from .beam_search import BeamSearch
from .choosing import Choice, choose
from .decoding import Decoding
from .forwards import Forward
from .output import RequestMetrics, RequestOutput
from .plan import StepPlan
from .pool_memory import PoolMemory
from .reporting import Reports
from .request import Request
from .scheduler import Scheduler
from .user_code import RAISED, as_error

Finish = Callable[[Request, str, Exception | None], None]


class OutputProcessor:
    """Gives logits to the requests they are for, and does what their decoding says.

    Whatever a request's own processor, criterion or streamer raises ends this request and no other.

    Args:
        forward: Is told before rows are forked.
        memory: Forks, selects and releases rows.
        scheduler: Is told of rows that are complete.
        reports: Are told of tokens.
        finish: Called with a request, its finish reason and its error or None.
        clock: Seconds; read when a request has its tokens.

    Attributes:
        num_generated: Tokens chosen, of all rows.
    """

    def __init__(
        self,
        forward: Forward,
        memory: PoolMemory,
        scheduler: Scheduler,
        reports: Reports,
        finish: Finish,
        clock: Callable[[], float],
    ) -> None:
        self._forward, self._memory, self._scheduler = forward, memory, scheduler
        self._reports, self._finish, self._clock = reports, finish, clock
        self.num_generated = 0

    def begin(self, request: Request) -> None:
        """The request runs for the first time."""
        request.decoding.rows = list(request.rows)
        request.decoding.begin()
        self._stream(request, torch.tensor([request.prompt_ids]))

    def choose(self, plan: StepPlan, logits: torch.Tensor) -> list[tuple[Request, Choice | torch.Tensor]]:
        """The next tokens of the requests that are ready; of a beam search its logits, `[num_beams, vocab_size]`.

        Args:
            plan: What was computed.
            logits: `[num_ready, vocab_size]`, a row for each chunk with which a sequence had no token left to compute.
        """
        ready, places, logits = self._ready(plan, logits)
        beams = [i for i, request in enumerate(ready) if isinstance(request.decoding, BeamSearch)]
        others = [i for i in range(len(ready)) if i not in beams] if beams else range(len(ready))
        chosen: list[tuple[Request, Choice | torch.Tensor]] = []
        if len(others):
            decodings = cast(list[Decoding], [ready[i].decoding for i in others])
            choices = choose(decodings, logits, [places[i] for i in others])
            chosen += zip((ready[i] for i in others), choices, strict=True)
        return chosen + [(ready[i], logits[places[i]].float()) for i in beams]

    def give(self, chosen: list[tuple[Request, Choice | torch.Tensor]]) -> None:
        """Hands requests what was chosen for them; beam searches make their turn."""
        for request, choice in chosen:
            if isinstance(choice, Exception):
                self._finish(request, "error", choice)
            elif isinstance(choice, torch.Tensor):
                self._turn(request, choice)
            else:
                self._accept(request, choice)

    def _ready(self, plan: StepPlan, logits: torch.Tensor) -> tuple[list[Request], list[list[int]], torch.Tensor]:
        """The requests all of whose rows have logits, and where these are in the (possibly longer) logits."""
        ready: list[Request] = []
        places: list[list[int]] = []
        several: dict[int, Request] = {}
        k = 0
        for request, row, _ in plan.chunks:
            if row.num_computed < len(row.tokens):
                continue
            if request.num_rows == 1:
                ready.append(request)
                places.append([k])
            else:
                request.held[id(row)] = logits[k]
                several[id(request)] = request
            k += 1
        for request in several.values():
            if len(request.held) == len(request.rows):
                logits, found = self._gather(request, logits)
                ready.append(request)
                places.append(found)
        return ready, places, logits

    def _gather(self, request: Request, logits: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Logits with those of all rows of a request behind them, and where they are; -1 for complete sequences."""
        decoding = request.decoding
        if len(decoding.rows) < decoding.num_rows:  # the prompt is computed: here the rows part
            self._forward.settle()
            (only,) = request.held.values()
            try:
                decoding.rows = self._memory.fork(decoding.rows[0], decoding.num_rows)
            finally:  # wherever an interrupt comes, both have the same rows
                request.rows = list(decoding.rows)
            request.held = {id(row): only for row in request.rows}
        parts = [request.held.get(id(row)) for row in decoding.rows]
        request.held = {}
        start = len(logits)
        logits = torch.cat([logits, torch.stack([part for part in parts if part is not None])])
        numbers = iter(range(start, len(logits)))
        return logits, [next(numbers) if part is not None else -1 for part in parts]

    def _accept(self, request: Request, tokens: list[int]) -> None:
        decoding = cast(Decoding, request.decoding)
        is_open = decoding.reasons[0] is None
        try:
            decoding.accept(tokens)
        except RAISED as raised:
            self._finish(request, "error", as_error(raised))
            return
        self._note(request, len(request.rows))
        try:
            if is_open:
                request.handle._push(tokens[0])
            if decoding.streamer is not None:
                self._stream(request, torch.tensor(tokens))
        finally:  # a token that was accepted is not accepted again, not even if the streamer was interrupted
            if decoding.is_complete:
                self._finish(request, decoding.reasons[0] or "stop", None)
            elif len(tokens) > 1:
                self._let_go(request)

    def _let_go(self, request: Request) -> None:
        """Complete sequences need their blocks no more."""
        for row, reason in zip(request.decoding.rows, request.decoding.reasons, strict=True):
            if reason is not None and row in request.rows:
                self._memory.release_row(row)
                request.rows.remove(row)
        self._scheduler.shrink(request)

    def _turn(self, request: Request, logits: torch.Tensor) -> None:
        search = cast(BeamSearch, request.decoding)
        try:
            turn = search.advance(logits)
        except RAISED as raised:
            self._finish(request, "error", as_error(raised))
            return
        if turn is not None:
            self._forward.settle()
            try:
                search.accept(turn, self._memory.select(search.rows, turn.parents))
            finally:  # wherever an interrupt comes, both have the same rows
                request.rows = list(search.rows)
        self._note(request, search.num_rows)
        if turn is None:
            self._finish(request, search.reasons[0] or "stop", None)

    def _note(self, request: Request, count: int) -> None:
        self.num_generated += count
        now = self._clock()
        if self._reports.observers:
            self._reports.generated(request, count, now)
        request.last_token_time = now
        if request.first_token_time is None:
            request.first_token_time = now

    def _stream(self, request: Request, ids: torch.Tensor) -> None:
        if request.decoding.streamer is not None:
            try:
                request.decoding.streamer.put(ids)
            except RAISED as raised:
                request.decoding.streamer = None  # it has had its say
                self._finish(request, "error", as_error(raised))


def make_output(request: Request, reason: str, error: Exception | None, now: float, tokenizer: Any) -> RequestOutput:
    """What a caller gets of a request that is over."""
    decoding = request.decoding
    sequences = decoding.sequences() if decoding.rows else []
    return RequestOutput(
        request_id=request.request_id,
        prompt_ids=list(request.prompt_ids),
        generated_tokens=sequences[0] if sequences else [],
        finish_reason=reason,
        error=error,
        cached_tokens=request.cached_tokens,
        metrics=_metrics(request, max(map(len, sequences), default=0), now),
        sequences=sequences,
        sequences_scores=decoding.sequences_scores,
        scores=tuple(decoding.scores) if decoding.scores is not None else None,
        logits=tuple(decoding.logits) if decoding.logits is not None else None,
        adapter_name=request.asked_adapter,
    ).decoded_by(tokenizer)


def _metrics(request: Request, count: int, now: float) -> RequestMetrics:
    arrival, first, last = request.arrival_time, request.first_token_time, request.last_token_time
    return RequestMetrics(
        arrival_time=arrival,
        queue_time=request.admitted_time - arrival if request.admitted_time is not None else None,
        ttft=first - arrival if first is not None else None,
        tpot=(last - first) / (count - 1) if first is not None and last is not None and count > 1 else None,
        e2e_latency=now - arrival,
        num_preemptions=request.num_preemptions,
    )
