"""What requests are expected to need, and how well that is known. Plain Python."""

from .cost_model import StepCost
from .policy import Outlook
from .predictor import DecayingMean, LengthPredictor, RankCheck
from .request import Request


class Estimates:
    """Lengths, step times and the self-check, put together into the work of a request.

    Args:
        num_slots: Rows of a full step.
        budget: Tokens of a full step.
    """

    def __init__(self, num_slots: int, budget: int) -> None:
        self._num_slots, self._budget = num_slots, budget
        self.predictor, self.rank_check, self.step_cost = LengthPredictor(), RankCheck(), StepCost()
        self._mean_work = DecayingMean(0.99)

    def assess(self, request: Request) -> None:
        """Sets `predicted_tokens` and `work` of a request that arrives."""
        request.predicted_tokens = self.predictor.predict(request)
        request.work = self._work(request, request.predicted_tokens)
        self._mean_work.add(request.work)

    def outlook(self, now: float, waiting_work: float) -> Outlook:
        """What policies may know, besides the request."""
        mean_work = self._mean_work.total / max(1.0, self._mean_work.count)
        return Outlook(now, mean_work, waiting_work / self._num_slots, self.rank_check.trust)

    def observe_output(self, request: Request, num_tokens: int) -> None:
        """Learns from a request that generated so many tokens per row."""
        self.predictor.observe(request, num_tokens)
        self.rank_check.observe(request.work, self._work(request, num_tokens))

    def _work(self, request: Request, num_new: float) -> float:
        shape = request.num_prompt_tokens, num_new, request.num_rows
        return self.step_cost.work(*shape, self._num_slots, self._budget)
