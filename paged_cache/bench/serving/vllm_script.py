"""Serves requests by vLLM: run by the interpreter of vLLM's environment, asked and answered in lines of JSON.

The first line has the options of `LLM`; every other one is a workload, and its answer has tokens and times. Nothing of
paged-cache is imported: it need not be installed there.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Until standard input ends. Whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    options = json.loads(sys.stdin.readline())
    try:
        import torch
        import vllm

        engine = vllm.LLM(**options).llm_engine
        answer({"versions": {"vllm": vllm.__version__, "torch": torch.__version__}})
        for line in sys.stdin:
            answer(Round(engine, json.loads(line)).serve())
    except Exception as error:  # noqa: BLE001 (it is told to whoever asked)
        answer({"error": f"vllm of {sys.executable}: {type(error).__name__}: {error}"})


class Round:
    """One workload: the engine's steps, with requests added as they come."""

    def __init__(self, engine: Any, task: dict[str, Any]) -> None:
        self.engine, self.task = engine, task
        self.count = len(task["prompts"])
        self.limit = task["max_concurrency"] or self.count
        self.tokens: list[list[int]] = [[] for _ in range(self.count)]
        self.times: list[list[float]] = [[] for _ in range(self.count)]
        self.arrivals: list[float] = []
        self.num_ended = self.cached_tokens = 0
        self.start = self.free_since = 0.0

    def serve(self) -> dict[str, Any]:
        """All of it; prefixes of earlier rounds are forgotten first."""
        self.engine.reset_prefix_cache()
        self.start = time.perf_counter()
        while self.num_ended < self.count:
            self._add()
            if self.engine.has_unfinished_requests():
                self._step()
            else:
                time.sleep(max(0.0, self.task["arrivals"][len(self.arrivals)] - self._now()))
        seconds = self._now()
        found = {"tokens": self.tokens, "times": self.times, "arrivals": self.arrivals}
        return {"seconds": seconds, "cached_tokens": self.cached_tokens, **found}

    def _now(self) -> float:
        return time.perf_counter() - self.start

    def _add(self) -> None:
        """Those that have come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        while (i := len(self.arrivals)) < self.count and i - self.num_ended < self.limit:
            if self.task["arrivals"][i] > self._now():
                break
            length = {"max_tokens": self.task["num_new"][i], "ignore_eos": True}
            params = SamplingParams(**length, temperature=0.0, detokenize=False, output_kind=kind)
            self.engine.add_request(str(i), {"prompt_token_ids": self.task["prompts"][i]}, params)
            self.arrivals.append(max(self.task["arrivals"][i], self.free_since))

    def _step(self) -> None:
        was_full = len(self.arrivals) - self.num_ended >= self.limit
        outputs = self.engine.step()
        now = self._now()
        for output in outputs:
            i, fresh = int(output.request_id), output.outputs[0].token_ids
            self.tokens[i] += fresh
            self.times[i] += [now] * len(fresh)
            self.num_ended += output.finished
            self.cached_tokens += (output.num_cached_tokens or 0) if output.finished else 0
        if was_full and len(self.arrivals) - self.num_ended < self.limit:
            self.free_since = now


if __name__ == "__main__":
    main()
