"""Scores of responses that are finished while others are still being sampled: threads beside the sampler, one line for each part.

What is scored ahead is remembered under what was judged (prompt and response), so that whoever needs the score finds it, and what nobody
scored ahead is scored later. Scorers get the same rows either way, but in other company: parts whose scores depend on it must not use this.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarl.data.tokenizers import Tokenizer
from megarl.errors import MegarlError, RewardError
from megarl.records import Completion, Prompt, RolloutRequest
from megarl.rewards.scorer import Found, Term, checked, key_of, prompt_ids


@dataclass(frozen=True)
class Row:
    """A finished response."""

    prompt: Prompt
    completion: Completion
    text: str


class EarlyScores:
    """The lines of the terms that are scored ahead. `take` is what `Engine.generate` calls when a response is finished.

    Args: `prompt_of` finds the prompt of a `prompt_id` (None: of another set); `patience_s` is how long a line may take when generation is
    over, where its term names no time of its own.
    """

    def __init__(self, terms: Sequence[Term], tokenizer: Tokenizer, prompt_of: Callable[[int], Prompt | None], patience_s: float):
        self._lines = [_Line(term, patience_s) for term in terms if term.ahead is not None]
        self._tokenizer, self._prompt_of = tokenizer, prompt_of

    @property
    def is_used(self) -> bool:
        """Whether any term is scored ahead."""
        return bool(self._lines)

    def take(self, request: RolloutRequest, completion: Completion) -> None:
        """Have a response scored. Returns at once; a continued one, or one to another set's prompt, is left for later."""
        prompt = self._prompt_of(request.prompt_id)
        if prompt is None or prompt.token_ids != request.token_ids:
            return
        row = Row(prompt, completion, self._tokenizer.decode_response(completion.token_ids))
        for line in self._lines:
            line.put(row)

    def settle(self) -> dict[str, Found]:
        """What was found since the last call, by the term's name, when every line is done. Raises `RewardError` when one is late."""
        return {line.name: line.settle() for line in self._lines}


class _Line:
    """Rows that wait for one term's scorer, and the threads that bring them to it, started with the first row."""

    def __init__(self, term: Term, patience_s: float):
        assert term.ahead is not None
        self.name, self._term, self._ahead = term.name, term, term.ahead
        self._patience_s = term.ahead.timeout_s or patience_s
        self._change = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._at_work: list[list[Row]] = []
        self._threads: list[threading.Thread] = []
        self._found: dict[str, float | list[str]] = {}
        self._fault: Exception | None = None

    def put(self, row: Row) -> None:
        with self._change:
            self._waiting.append(row)
            if len(self._threads) < self._ahead.threads:
                self._threads.append(threading.Thread(target=self._serve, name=f"reward {self.name}", daemon=True))
                self._threads[-1].start()
            self._change.notify_all()

    def settle(self) -> Found:
        with self._change:
            is_done = self._change.wait_for(lambda: not self._waiting and not self._at_work, self._patience_s)
            if not is_done:
                late = [row.completion for rows in (*self._at_work, self._waiting) for row in rows]
                raise RewardError(
                    f"reward {self.name}: no scores for {prompt_ids(late)} within {self._patience_s:g} s after the last was sampled"
                )
            if self._fault is not None:
                raise self._fault
            found, self._found = self._found, {}
            return found

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting)
                rows = [self._waiting.popleft() for _ in range(min(self._ahead.most, len(self._waiting)))]
                self._at_work.append(rows)
            found, fault = self._scored(rows)
            with self._change:
                self._found |= found
                self._fault = self._fault or fault
                self._at_work.remove(rows)
                if fault is not None or any(isinstance(entry, list) for entry in found.values()):
                    self._waiting.clear()  # the run ends; what is left would only delay that
                self._change.notify_all()

    def _scored(self, rows: Sequence[Row]) -> tuple[dict[str, float | list[str]], Exception | None]:
        prompts, completions = [row.prompt for row in rows], [row.completion for row in rows]
        keys = [key_of(completion) for completion in completions]
        try:
            scores = self._term.scorer.score(prompts, completions, [row.text for row in rows])
            return dict(zip(keys, checked(f"reward {self.name}", scores, completions), strict=True)), None
        except MegarlError as error:
            return {key: [type(error).__name__, str(error)] for key in keys}, None
        except Exception as error:  # ours: `settle` raises it where a traceback is seen
            return {}, error
