"""What a batcher does and a pool holds: events, Prometheus metrics, a log line, traces of requests, maps of blocks.

All of it is off until something is attached: `batcher.observe(...)`, `PrometheusMetrics(batcher)`, `log_stats=True`.
"""

from ..batching.events import (
    Event,
    Finished,
    Generated,
    Idle,
    Observer,
    Preempted,
    Prefilled,
    Queued,
    RequestEvent,
    Scheduled,
    StepDone,
)
from ..batching.stats_logger import StatsLogger
from .chrome_trace import ChromeTrace
from .maps import save_pool_map
from .prometheus import PrometheusMetrics

__all__ = [
    "ChromeTrace",
    "Event",
    "Finished",
    "Generated",
    "Idle",
    "Observer",
    "Preempted",
    "Prefilled",
    "PrometheusMetrics",
    "Queued",
    "RequestEvent",
    "Scheduled",
    "StatsLogger",
    "StepDone",
    "save_pool_map",
]
