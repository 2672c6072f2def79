"""vLLM on the same requests: a process of its own, in an environment of its own, that is asked for a round at a time."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import PagedCacheError
from ..workload import Workload
from .outcome import Pace, Run, Served

SCRIPT = Path(__file__).with_name("vllm_script.py")
START_SECONDS, ROUND_SECONDS, STOP_SECONDS = 900.0, 900.0, 20.0


class PeerError(PagedCacheError):
    """Another engine cannot be started, failed, or does not answer."""


@dataclass
class Vllm:
    """A context: the process runs inside, and ends with it.

    Attributes:
        python: Interpreter of the environment that vLLM is installed in.
        options: Of its `LLM`.
        kv_bytes: What it allocates for K and V; it does not say how much of that requests use.
        threads: It is bound to so many cores.
        script: What runs there.
        versions: Of vllm and its torch; known inside.
    """

    python: Path
    options: dict[str, Any]
    kv_bytes: int
    threads: int = 1
    name: str = "vllm"
    script: Path = SCRIPT
    start_seconds: float = START_SECONDS
    round_seconds: float = ROUND_SECONDS
    versions: dict[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Settings."""
        own = {name: value for name, value in self.options.items() if name not in ("model", "skip_tokenizer_init")}
        return own | {"versions": self.versions}

    def __enter__(self) -> "Vllm":
        """Loads the model.

        Raises:
            PeerError: There is no such interpreter, or no vLLM in its environment, or it cannot load the model.
        """
        with ExitStack() as stack:
            self._log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "vllm.log"
            errors = stack.enter_context(self._log.open("w", encoding="utf-8"))
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            command = [str(self.python), "-I", str(self.script)]
            try:
                self._process = subprocess.Popen(command, **pipes, env=self._environment(), text=True, bufsize=1)
            except OSError as error:
                raise PeerError(f"vllm: cannot run {self.python}: {error.strerror}; see --peer-python.") from error
            stack.callback(self._stop)
            self._answers: queue.Queue[str] = queue.Queue()
            self._error = ""
            threading.Thread(target=self._listen, daemon=True).start()
            hello = self._ask({**self.options, "kv_cache_memory_bytes": self.kv_bytes}, self.start_seconds)
            self.versions = hello["versions"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the process."""
        self._stack.close()

    def serve(self, workload: Workload, pace: Pace | None = None) -> Run:
        """One round.

        Raises:
            PeerError: It failed, or does not answer in time; then it is stopped.
        """
        pace = pace or Pace.at_once(len(workload.prompts))
        task = {"prompts": workload.prompts, "num_new": workload.num_new}
        task |= {"arrivals": pace.arrivals, "max_concurrency": pace.max_concurrency}
        found = self._ask(task, self.round_seconds + pace.arrivals[-1])
        requests = list(map(Served, found["tokens"], found["times"], found["arrivals"]))
        return Run(found["seconds"], requests, self.kv_bytes, cached_tokens=found["cached_tokens"])

    def _ask(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a line; after an error there are no more."""
        if not self._error:
            answer = self._try(task, seconds)
            self._error = str(answer.get("error", ""))
        if self._error:
            self._stop(0)
            raise PeerError(self._error)
        return answer

    def _try(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(task) + "\n")  # type: ignore[union-attr]
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            return {"error": f"vllm does not answer within {seconds:g} s."}
        except OSError:  # it is gone
            line = ""
        if not line:
            self._stop()
            return {"error": f"vllm ended with code {self._process.returncode}: {self._last_words()}"}
        return dict(json.loads(line))

    def _listen(self) -> None:
        """Answers, and an empty one for the end."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ends the process, after some patience; it may be over."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def _environment(self) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(self.threads))
        own = {
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are taken by whoever asks for them
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[: self.threads])),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        hidden = {"OMP_NUM_THREADS", "PYTHONPATH"}
        return {name: value for name, value in os.environ.items() if name not in hidden} | own
