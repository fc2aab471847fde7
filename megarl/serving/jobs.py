"""Requests that wait for the model: one queue, first come first served, each with a deadline of its own."""

import threading
import time
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from megarl.serving.questions import Question, Refusal


@dataclass
class Job:
    """The questions of one request, and after `settle` their scores or the refusal."""

    questions: list[Question]
    until: float  # on the monotonic clock; nobody waits for it afterwards
    outcome: list[float] | Refusal | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def settle(self, outcome: list[float] | Refusal) -> None:
        """Hand the outcome to whoever waits for it."""
        self.outcome = outcome
        self.done.set()


class Jobs:
    """The queue between the threads that talk to clients, which `ask`, and the one that computes, which takes the `next`."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Job | None] = SimpleQueue()
        self.is_closed = False

    def ask(self, questions: list[Question], timeout_s: float) -> list[float]:
        """The scores of the questions. Raises `Refusal`: the model's, or 503 after `timeout_s` and when the server is stopping."""
        if self.is_closed:
            raise Refusal(503, "the server is stopping")
        job = Job(questions, time.monotonic() + timeout_s)
        self._waiting.put(job)
        if not job.done.wait(timeout_s):
            raise Refusal(503, f"no scores within {timeout_s:g} s (--timeout); about {self._waiting.qsize()} requests wait")
        assert job.outcome is not None
        if isinstance(job.outcome, Refusal):
            raise job.outcome
        return job.outcome

    def next(self, patience_s: float) -> Job | None:
        """The next job that somebody still waits for; None after `patience_s` without one, and when the queue is closed and empty."""
        until = time.monotonic() + patience_s
        while not (self.is_closed and self._waiting.empty()):
            try:
                job = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                return None
            if job is not None and time.monotonic() < job.until:
                return job
        return None

    def close(self) -> None:
        """No further jobs; those that wait are still done. May be called by a signal's handler."""
        self.is_closed = True
        self._waiting.put(None)  # wakes `next`

    @property
    def is_over(self) -> bool:
        """True when the queue is closed and every job was taken."""
        return self.is_closed and self._waiting.empty()
