"""One request in a trace: its events become spans that lie one behind the other."""

from typing import Any

from ..batching.events import Finished, Generated, Preempted, Prefilled, Queued, RequestEvent, Scheduled


class RequestTrack:
    """Spans and instants of one request, as Chrome's trace format has them.

    At most one of the spans "queued", "decode" and "preempted" is open; a "prefill" comes as a whole and ends whichever is.

    Args:
        pid, tid: The track.
        zero: Seconds that become time 0.

    Attributes:
        tid: As given.
    """

    def __init__(self, pid: int, tid: int, zero: float) -> None:
        self.tid, self._pid, self._zero = tid, pid, zero
        self._entries: list[dict[str, Any]] = []
        self._open: tuple[str, float, dict[str, Any]] | None = None

    def add(self, event: RequestEvent) -> None:
        """What happened next."""
        match event:
            case Queued():
                about: dict[str, Any] = {
                    "prompt tokens": event.num_prompt_tokens,
                    "max_new_tokens": event.max_new_tokens,
                }
                about |= {"sequences": event.num_rows, "priority": event.priority, "adapter": event.adapter_name}
                self._begin("queued", event.time, about)
            case Scheduled():
                self._end(event.time, {"tokens": event.num_tokens, "cached tokens": event.num_cached_tokens})
            case Prefilled():
                self._end(event.start)
                about = {"tokens": event.num_tokens, "position": event.position, "again": event.is_again}
                self._span("prefill", event.start, event.time, about)
            case Generated():
                if event.is_first:
                    self._instant("first token", event.time, {"seconds since arrival": event.seconds})
                self._count(event)
            case Preempted():
                self._end(event.time)
                self._begin("preempted", event.time, {"preemptions": event.num_preemptions})
            case Finished():
                self._end(event.time)
                self._instant("finished", event.time, _end_of(event))

    def entries_until(self, end: float) -> list[dict[str, Any]]:
        """All entries; what is open goes on until `end`."""
        self._end(end)
        return self._entries

    def _count(self, event: Generated) -> None:
        """One more token of a decode span, which begins with the first one behind a prefill."""
        if self._open is None or self._open[0] != "decode":
            self._begin("decode", event.time, {"tokens": 0})
        assert self._open is not None
        self._open[2]["tokens"] += event.num_tokens

    def _begin(self, name: str, time: float, args: dict[str, Any]) -> None:
        self._end(time)
        self._open = name, time, args

    def _end(self, time: float, more: dict[str, Any] | None = None) -> None:
        if self._open is not None:
            name, start, args = self._open
            self._open = None
            self._span(name, start, max(start, time), {**args, **(more or {})})

    def _span(self, name: str, start: float, end: float, args: dict[str, Any]) -> None:
        self._entries.append({**self._entry("X", name, start), "dur": 1e6 * (end - start), "args": args})

    def _instant(self, name: str, time: float, args: dict[str, Any]) -> None:
        self._entries.append({**self._entry("i", name, time), "s": "t", "args": args})

    def _entry(self, phase: str, name: str, time: float) -> dict[str, Any]:
        ts = 1e6 * (time - self._zero)
        return {"ph": phase, "name": name, "cat": "request", "pid": self._pid, "tid": self.tid, "ts": ts}


def _end_of(event: Finished) -> dict[str, Any]:
    times = event.metrics
    return {
        "finish reason": event.finish_reason,
        "error": event.error,
        "prompt tokens": event.num_prompt_tokens,
        "cached tokens": event.num_cached_tokens,
        "generated tokens": event.num_generated_tokens,
        "preemptions": times.num_preemptions,
        "queue_time": times.queue_time,
        "ttft": times.ttft,
        "tpot": times.tpot,
        "e2e_latency": times.e2e_latency,
    }
