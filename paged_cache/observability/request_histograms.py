"""Histograms of a batcher's requests, filled from its events."""

from ..batching.events import Event, Finished, Generated, StepDone
from .histograms import (
    FIRST_TOKEN_SECONDS,
    REQUEST_SECONDS,
    SEQUENCES,
    STEP_TOKENS,
    TOKEN_SECONDS,
    Histogram,
    length_buckets,
)


class RequestHistograms:
    """Observes a batcher; the names are vLLM's.

    Args:
        longest: Most tokens of a sequence: buckets of lengths end there.

    Attributes:
        by_name: The histograms.
    """

    def __init__(self, longest: int) -> None:
        lengths = length_buckets(longest)
        self.by_name = {
            "time_to_first_token_seconds": Histogram("Seconds from arrival to first token.", FIRST_TOKEN_SECONDS),
            "inter_token_latency_seconds": Histogram("Seconds from one token to the next.", TOKEN_SECONDS),
            "e2e_request_latency_seconds": Histogram("Seconds from arrival to end.", REQUEST_SECONDS),
            "request_queue_time_seconds": Histogram("Seconds from arrival to first being scheduled.", REQUEST_SECONDS),
            "request_prefill_time_seconds": Histogram("Seconds from there to the first token.", REQUEST_SECONDS),
            "request_decode_time_seconds": Histogram("Seconds from first to last token.", REQUEST_SECONDS),
            "request_inference_time_seconds": Histogram("Seconds from being scheduled to last token.", REQUEST_SECONDS),
            "iteration_tokens_total": Histogram("Tokens computed in a step.", STEP_TOKENS),
            "request_prompt_tokens": Histogram("Tokens of a request's prompt.", lengths),
            "request_generation_tokens": Histogram("Tokens that a request generated.", lengths),
            "request_params_n": Histogram("Sequences that a request returns.", SEQUENCES),
            "request_params_max_tokens": Histogram("max_new_tokens of a request.", lengths),
        }

    def __call__(self, event: Event) -> None:
        """Counts an event."""
        if isinstance(event, Generated):
            name = "time_to_first_token_seconds" if event.is_first else "inter_token_latency_seconds"
            self.by_name[name].observe(event.seconds)
        elif isinstance(event, StepDone):
            self.by_name["iteration_tokens_total"].observe(event.num_tokens)
        elif isinstance(event, Finished) and event.finish_reason != "rejected":
            for name, value in _values(event).items():
                self.by_name[name].observe(value)


def _values(event: Finished) -> dict[str, float]:
    """What is counted of a request that is over: times only of what it came to."""
    times = event.metrics
    values: dict[str, float] = {
        "e2e_request_latency_seconds": times.e2e_latency or 0.0,
        "request_prompt_tokens": event.num_prompt_tokens,
        "request_generation_tokens": event.num_generated_tokens,
        "request_params_n": event.num_sequences,
        "request_params_max_tokens": event.max_new_tokens,
    }
    if times.queue_time is not None:
        values["request_queue_time_seconds"] = times.queue_time
        if times.ttft is not None:
            prefill, decode = times.ttft - times.queue_time, event.decode_time
            values["request_prefill_time_seconds"] = prefill
            values["request_decode_time_seconds"] = decode
            values["request_inference_time_seconds"] = prefill + decode
    return values
