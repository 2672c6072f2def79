"""When requests come."""

import math
import random

from ...errors import InvalidRequestError
from .outcome import Pace


def make_pace(
    count: int,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    seed: int = 0,
) -> Pace:
    """Gaps between requests are drawn, then stretched so that the last one comes after `count / request_rate` seconds.

    Args:
        count: Requests.
        request_rate: A second; infinite: all of them at the start.
        burstiness: Shape of the gamma distribution that gaps have: 1 is a Poisson process, less comes in bursts, more evenly.
        max_concurrency: Of the pace.
        seed: Of the gaps.

    Raises:
        InvalidRequestError: A number is not above 0.
    """
    for name, value in (
        ("request_rate", request_rate),
        ("burstiness", burstiness),
        ("max_concurrency", max_concurrency),
    ):
        if value is not None and not value > 0:
            raise InvalidRequestError(f"{name} is {value}; it has to be above 0.")
    if math.isinf(request_rate):
        return Pace([0.0] * count, max_concurrency)
    rng, now, arrivals = random.Random(seed), 0.0, list[float]()
    for _ in range(count):
        now += rng.gammavariate(burstiness, 1 / (request_rate * burstiness))
        arrivals.append(now)
    scale = count / request_rate / now if now else 1.0
    return Pace([arrival * scale for arrival in arrivals], max_concurrency)
