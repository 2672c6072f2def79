"""What could be reached: the shortest remaining work first, lengths known, preemption for nothing."""

from dataclasses import dataclass
from heapq import heappop, heappush

from .simulator import Engine, Outcome
from .workloads import Job


@dataclass(eq=False, slots=True)
class _Course:
    """How far a request is."""

    number: int
    job: Job
    num_computed: int
    num_generated: int = 0
    first: float = 0.0
    started: float = -1.0

    def work(self, engine: Engine) -> float:
        """Seconds of a slot's time that are left."""
        job, slots = self.job, engine.slots
        prompt = max(0, job.prompt - self.num_computed) * (engine.per_token + engine.per_step / engine.budget)
        context = job.prompt + (job.output + self.num_generated) / 2
        token = engine.per_step + slots * (engine.per_token + engine.per_kv * context)
        return slots * prompt + (job.output - self.num_generated) * token


class ShortestRemainingFirst:
    """At any time the slots are those of the requests with the least remaining work; the others keep their K and V for nothing.

    No scheduler could do that: memory is without end here, and lengths are known.
    """

    def __init__(self, engine: Engine, jobs: list[Job]) -> None:
        self.engine, self._jobs = engine, jobs
        self.now, self._num_arrived = 0.0, 0
        self._running: list[_Course] = []
        self._waiting: list[tuple[float, int, _Course]] = []
        self._outcomes: dict[int, Outcome] = {}

    def run(self) -> list[Outcome]:
        """Everything, in the order of arrival."""
        while len(self._outcomes) < len(self._jobs):
            if not self._running and not self._waiting:
                self.now = max(self.now, self._next_time())
            self._arrive()
            self._step()
        return [self._outcomes[number] for number in range(len(self._jobs))]

    def _next_time(self) -> float:
        return self._jobs[self._num_arrived].time if self._num_arrived < len(self._jobs) else float("inf")

    def _arrive(self) -> None:
        while self._next_time() <= self.now:
            job = self._jobs[self._num_arrived]
            course = _Course(self._num_arrived, job, min(job.hit, job.prompt - 1))
            heappush(self._waiting, (course.work(self.engine), course.number, course))
            self._num_arrived += 1
        while self._waiting and len(self._running) < self.engine.slots:
            self._running.append(heappop(self._waiting)[2])
        while self._waiting:
            longest = max(self._running, key=lambda course: course.work(self.engine))
            work = longest.work(self.engine)
            if self._waiting[0][0] >= work:
                break
            self._running.remove(longest)
            self._running.append(heappop(self._waiting)[2])
            heappush(self._waiting, (work, longest.number, longest))

    def _step(self) -> None:
        """One step, or as many that only decode as there are until something happens."""
        plan, left = [], self.engine.budget - len(self._running)
        for course in sorted(self._running, key=lambda course: course.work(self.engine)):
            to_go = course.job.prompt - course.num_computed
            num = min(to_go, left) if to_go > 0 else 1
            left -= num if to_go > 0 else 0
            if num:
                plan.append((course, num))
            if course.started < 0:
                course.started = self.now
        num_kv = sum(course.num_computed + num for course, num in plan)
        seconds = self.engine.seconds(sum(num for _, num in plan), num_kv)
        count = 1
        if all(course.num_generated for course in self._running):
            count = min(course.job.output - course.num_generated for course in self._running)
            if self._next_time() < float("inf"):
                count = max(1, min(count, 1 + int((self._next_time() - self.now) / seconds)))
        self.now += count * (seconds + self.engine.per_kv * len(plan) * (count - 1) / 2)
        for course, num in plan:
            self._advance(course, num * count)

    def _advance(self, course: _Course, num: int) -> None:
        job, is_prompt = course.job, course.num_computed < course.job.prompt
        course.num_computed += num
        if is_prompt and course.num_computed < job.prompt:
            return
        course.first = course.first or self.now
        course.num_generated += 1 if is_prompt else num
        if course.num_generated >= job.output:
            self._running.remove(course)
            times = course.started - job.time, course.first - job.time, self.now - job.time
            self._outcomes[course.number] = Outcome(job, *times, 0)
