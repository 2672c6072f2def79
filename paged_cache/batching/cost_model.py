"""How long a step takes and how much of a slot's time a request will need, fitted to measured steps. Plain Python."""

START = (0.015, 4e-5, 4e-8)  # seconds per step, per token, per token of K and V read: until there are measurements


class StepCost:
    """`seconds = per_step + per_token * tokens + per_kv_token * kv_tokens`, by least squares of relative errors.

    Relative errors make a step that took far too long (the first one compiles, the machine was busy) count for at most 1.
    Older steps fade; no coefficient becomes negative; what steps so far do not tell apart (all of them alike) stays as at the
    start, times a common factor.

    Args:
        decay: What a step counts for after the next one.
        stiffness: Weight of the start, as a share of that of the measurements.
    """

    def __init__(self, decay: float = 0.995, stiffness: float = 1e-4) -> None:
        self._decay, self._stiffness = decay, stiffness
        self._moments = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self._factors = [1.0] * 3

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Seconds per step, per token, and per token of K and V read."""
        a, b, c = (start * factor for start, factor in zip(START, self._factors, strict=True))
        return a, b, c

    def seconds(self, num_tokens: float, kv_tokens: float) -> float:
        """What a step is expected to take."""
        a, b, c = self.coefficients
        return a + b * num_tokens + c * kv_tokens

    def work(self, num_prompt: float, num_new: float, num_rows: int, num_slots: int, budget: int) -> float:
        """Seconds of a slot's time that a request takes while all slots are busy and prompts fill the budget.

        Args:
            num_prompt: Tokens of the prompt.
            num_new: Tokens that each of the `num_rows` generates.
            num_rows: Slots that it holds.
            num_slots: Rows of a step.
            budget: Tokens of a step.
        """
        a, b, c = self.coefficients
        prompt = num_slots * num_prompt * (b + a / budget)
        return prompt + num_rows * num_new * (a + num_slots * (b + c * (num_prompt + num_new / 2)))

    def observe(self, seconds: float, num_tokens: int, kv_tokens: int) -> None:
        """Takes in a step: tokens computed, and the contexts of its rows together."""
        if seconds <= 0:
            return
        features = START[0] / seconds, START[1] * num_tokens / seconds, START[2] * kv_tokens / seconds
        for row, x in zip(self._moments, features, strict=True):
            row[:] = [old * self._decay + x * y for old, y in zip(row, features, strict=True)]
        self._targets = [old * self._decay + x for old, x in zip(self._targets, features, strict=True)]
        self._fit()

    def _fit(self) -> None:
        """One round of coordinate descent from the last fit: steps come by the hundred, and each may take little time."""
        moments, targets, factors = self._moments, self._targets, self._factors
        common = sum(targets) / sum(map(sum, moments))
        weight = self._stiffness * (moments[0][0] + moments[1][1] + moments[2][2])
        for i, row in enumerate(moments):
            rest = row[0] * factors[0] + row[1] * factors[1] + row[2] * factors[2] - row[i] * factors[i]
            factors[i] = max(0.0, (targets[i] + weight * common - rest) / (row[i] + weight))
