"""`ChromeTrace`: what happened to each request, as a file that chrome://tracing and Perfetto show."""

import json
import threading
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

from ..batching.events import Event, RequestEvent, StepDone
from ..errors import InvalidRequestError
from .request_track import RequestTrack

ENGINE, REQUESTS = 1, 2
"""Process ids: viewers group tracks by process."""


class ChromeTrace:
    """Keeps the events of a batcher: `trace = batcher.observe(ChromeTrace())`.

    One event per request and step, 100 to 200 bytes each. When there are too many the oldest go; a request that began
    before the oldest one kept is shown from there on.

    Args:
        max_events: Most events that are kept.

    Attributes:
        num_dropped: Events that went since the trace was made.

    Raises:
        InvalidRequestError: `max_events` is not positive.
    """

    def __init__(self, max_events: int = 200_000) -> None:
        if max_events < 1:
            raise InvalidRequestError(f"max_events={max_events!r}: at least 1 is needed.")
        self._events: deque[Event] = deque(maxlen=max_events)
        self._lock = threading.Lock()
        self.num_dropped = 0

    def __call__(self, event: Event) -> None:
        """Keeps an event."""
        with self._lock:
            self.num_dropped += len(self._events) == self._events.maxlen
            self._events.append(event)

    def __len__(self) -> int:
        return len(self._events)

    @property
    def events(self) -> list[Event]:
        """Those that are kept, in the order in which they came."""
        with self._lock:
            return list(self._events)

    def for_request(self, request_id: str) -> list[RequestEvent]:
        """The kept events of one request, in order; times are seconds on the batcher's clock."""
        return [event for event in self.events if isinstance(event, RequestEvent) and event.request_id == request_id]

    def clear(self) -> None:
        """Forgets all events."""
        with self._lock:
            self._events.clear()
            self.num_dropped = 0

    def as_dict(self) -> dict[str, Any]:
        """The trace as the file has it, times in microseconds since the first event.

        A process "engine" with a track of steps and counters; a process "requests" with a track for each request: spans
        "queued", "prefill", "decode" and "preempted", and instants "first token" and "finished".
        """
        events = self.events
        zero = min((getattr(event, "start", event.time) for event in events), default=0.0)
        tracks: dict[str, RequestTrack] = {}
        for event in events:
            if isinstance(event, RequestEvent):
                if event.request_id not in tracks:
                    tracks[event.request_id] = RequestTrack(REQUESTS, len(tracks) + 1, zero)
                tracks[event.request_id].add(event)
        end = max((event.time for event in events), default=0.0)
        entries = [_name("process_name", ENGINE, 0, "engine"), _name("process_name", REQUESTS, 0, "requests")]
        entries.append(_name("thread_name", ENGINE, 1, "steps"))
        entries += [_name("thread_name", REQUESTS, track.tid, name) for name, track in tracks.items()]
        for step in events:
            if isinstance(step, StepDone):
                entries += _step(step, zero)
        for track in tracks.values():
            entries += track.entries_until(end)
        about = {"dropped_events": self.num_dropped, "clock_zero_seconds": zero}
        return {"traceEvents": entries, "displayTimeUnit": "ms", "otherData": about}

    def save(self, path: str | Path) -> Path:
        """Writes the trace as JSON, for chrome://tracing or https://ui.perfetto.dev; the folder is made if it is not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict()), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        ids = {event.request_id for event in self.events if isinstance(event, RequestEvent)}
        shown = ", ".join(islice(sorted(ids), 3)) + (", ..." if len(ids) > 3 else "")
        return f"ChromeTrace({len(self)} events of {len(ids)} requests: {shown}; {self.num_dropped} dropped)"


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    """Metadata: what a process or a track is called."""
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _step(step: StepDone, zero: float) -> list[dict[str, Any]]:
    """The span of a step, and the counters behind it."""
    start, end = (1e6 * (moment - zero) for moment in (step.start, step.time))
    num_others = step.num_tokens - step.num_prompt_tokens
    args = {"tokens": step.num_tokens, "sequences": step.num_rows, "prompt tokens": step.num_prompt_tokens}
    args |= {"cached prompt tokens": step.num_cached_tokens, "generated tokens": step.num_generated_tokens}
    counters = {
        "requests": {"running": step.num_running, "waiting": step.num_waiting},
        "blocks in use": {"blocks": step.blocks_in_use},
        "tokens in step": {"prompt": step.num_prompt_tokens, "other": num_others},
    }
    span = {"ph": "X", "name": "step", "cat": "engine", "pid": ENGINE, "tid": 1, "ts": start, "dur": end - start}
    return [
        {**span, "args": args},
        *({"ph": "C", "name": name, "pid": ENGINE, "tid": 1, "ts": end, "args": v} for name, v in counters.items()),
    ]
