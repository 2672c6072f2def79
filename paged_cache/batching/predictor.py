"""How much a request will generate, learned from those that ended. Plain Python."""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

from .request import Request


class DecayingMean:
    """A mean in which each value counts a little less than the one after it."""

    __slots__ = ("_decay", "count", "total")

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.total = self.count = 0.0

    def add(self, value: float) -> None:
        """Takes in one value."""
        self.total = self.total * self._decay + value
        self.count = self.count * self._decay + 1.0

    def towards(self, prior: float, weight: float) -> float:
        """The mean as if `weight` more values had been `prior`."""
        return (self.total + weight * prior) / (self.count + weight)


class History:
    """Means of everything, of each tenant, and of each tenant's prompts of about one length; few values lean on the coarser mean.

    Args:
        max_tenants: Those seen last are kept.
        decay: What a value counts for after the next one.
        pseudo_count: How many values the coarser mean stands for.
    """

    def __init__(self, max_tenants: int = 1024, decay: float = 0.98, pseudo_count: float = 3.0) -> None:
        self._max_tenants, self._decay, self._pseudo_count = max_tenants, decay, pseudo_count
        self._all = DecayingMean(decay)
        self._tenants: OrderedDict[Hashable, dict[int | None, DecayingMean]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, tenant: Hashable, num_prompt_tokens: int, value: float) -> None:
        """Takes in what came of one request."""
        means = self._tenants.setdefault(tenant, {})
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > self._max_tenants:
            self._tenants.popitem(last=False)
        self._all.add(value)
        for part in (None, self._bucket(num_prompt_tokens)):
            if part not in means:
                means[part] = DecayingMean(self._decay)
            means[part].add(value)

    def mean(self, tenant: Hashable, num_prompt_tokens: int) -> float | None:
        """What is to be expected; None before there was anything."""
        if not self._all.count:
            return None
        mean, means = self._all.total / self._all.count, self._tenants.get(tenant, {})
        for part in (None, self._bucket(num_prompt_tokens)):
            if part in means:
                mean = means[part].towards(mean, self._pseudo_count)
        return mean

    @staticmethod
    def _bucket(num_prompt_tokens: int) -> int:
        """Four buckets an octave."""
        return int(4 * math.log2(max(num_prompt_tokens, 1)))


class LengthPredictor:
    """Expected tokens of a request, from two histories: tokens that were generated, and their share of `max_new_tokens`.

    The one that was nearer of late is believed. The share knows callers who ask for what they need; the tokens, all others.
    """

    def __init__(self) -> None:
        self._tokens, self._shares = History(), History()
        self._token_error, self._share_error = DecayingMean(0.98), DecayingMean(0.98)

    def predict(self, request: Request) -> float:
        """Tokens per row, from 1 to `max_new_tokens`: the caller's own prediction, or the history's, or the limit."""
        expected = request.expected_tokens
        if expected is None:
            by_tokens, by_share = self._both(request)
            expected = by_share if self._share_error.total < self._token_error.total else by_tokens
        return max(1.0, min(float(expected), request.max_new_tokens))

    def observe(self, request: Request, num_tokens: int) -> None:
        """Takes in a request that generated so many tokens per row."""
        actual = math.log(max(num_tokens, 1))
        for expected, error in zip(self._both(request), (self._token_error, self._share_error), strict=True):
            error.add(abs(math.log(max(expected, 1.0)) - actual))
        place = request.tenant, request.num_prompt_tokens
        self._tokens.add(*place, num_tokens)
        self._shares.add(*place, num_tokens / max(request.max_new_tokens, 1))

    def _both(self, request: Request) -> tuple[float, float]:
        """What either history says."""
        limit, place = request.max_new_tokens, (request.tenant, request.num_prompt_tokens)
        tokens, share = self._tokens.mean(*place), self._shares.mean(*place)
        return (limit if tokens is None else min(tokens, limit)), (limit if share is None else limit * share)


class RankCheck:
    """Whether predictions put requests in about the order that turns out to be right: Spearman's correlation over the last ones.

    Args:
        window: How many of the last requests count.
        least: Correlation up to which predictions are worth nothing: chance alone makes some.
        enough: Correlation from which they are followed all the way.
        patience: Requests until there is a verdict, which is good before.
    """

    EVERY = 16

    def __init__(self, window: int = 256, least: float = 0.1, enough: float = 0.3, patience: int = 32) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=window)
        self._least, self._enough, self._patience = least, enough, patience
        self._num_seen = 0
        self.correlation: float | None = None

    @property
    def trust(self) -> float:
        """0 to 1: what predictions are worth, as far as is known."""
        if self.correlation is None:
            return 1.0
        return min(1.0, max(0.0, (self.correlation - self._least) / (self._enough - self._least)))

    def observe(self, predicted: float, actual: float) -> None:
        """Takes in one request; every sixteenth time there is a new verdict."""
        self._pairs.append((predicted, actual))
        self._num_seen += 1
        if self._num_seen >= self._patience and self._num_seen % self.EVERY == 0:
            self.correlation = spearman(*zip(*self._pairs, strict=True))


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation; 0 where all values of one side are equal."""
    left, right = _centred_ranks(left), _centred_ranks(right)
    norm = math.sqrt(sum(x * x for x in left) * sum(x * x for x in right))
    return sum(x * y for x, y in zip(left, right, strict=True)) / norm if norm else 0.0


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value less the mean rank; equal values share theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + stop - len(values)) / 2
        start = stop
    return ranks
