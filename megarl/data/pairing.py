"""Scored responses to the same prompt become preference pairs, ranked lists, or the best response as a demonstration."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from megarl.config import DataSource
from megarl.data.fields import LineFault, kind_of, required, text_field
from megarl.data.reading import read_rows
from megarl.errors import DataError

Row = dict[str, Any]
Form = Literal["pairs", "rankings", "best"]


@dataclass(frozen=True)
class Candidate:
    """Where a response and its score stand in a row: dotted names. `score` may be a number instead."""

    response: str
    score: str

    def of(self, row: Row) -> tuple[Any, float]:
        """The response and its score; true counts 1 and false 0."""
        try:
            score: Any = float(self.score)
        except ValueError:
            score = _inside(row, self.score)
        return _inside(row, self.response), _number(score, self.score)


@dataclass
class Group:
    """One prompt and what was answered. `rest` are columns of its first row that go along."""

    prompt: Any
    rest: Row
    responses: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, response: str, score: float) -> None:
        """Note a response; one that was given before counts once."""
        if response not in self.responses:
            self.responses.append(response)
            self.scores.append(score)

    def best_first(self) -> list[int]:
        """Responses by falling score, those of equal score in the order they came."""
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))

    def rows(self, form: Form, per_prompt: int) -> Iterator[Row]:
        """What is written about this prompt: nothing where all responses have one score, except the best."""
        order = self.best_first()
        if form == "best":
            yield {"prompt": self.prompt, "response": self.responses[order[0]], "score": self.scores[order[0]], **self.rest}
        elif form == "rankings" and self.scores[order[0]] > self.scores[order[-1]]:
            yield {
                "prompt": self.prompt,
                "responses": [self.responses[i] for i in order],
                "scores": [self.scores[i] for i in order],
                **self.rest,
            }
        elif form == "pairs":
            for better, worse in self._pairs(order)[:per_prompt]:
                margin = self.scores[better] - self.scores[worse]
                yield {
                    "prompt": self.prompt,
                    "chosen": self.responses[better],
                    "rejected": self.responses[worse],
                    "margin": margin,
                    **self.rest,
                }

    def _pairs(self, order: Sequence[int]) -> list[tuple[int, int]]:
        """Every better and worse response, the largest margins first; among equal ones no response comes twice before others came once."""
        pairs = [(a, b) for a, b in product(order, order) if self.scores[a] > self.scores[b]]
        rank = {i: position for position, i in enumerate(order)}
        used: dict[int, int] = {}
        ranked = []
        for margin in sorted({self.scores[a] - self.scores[b] for a, b in pairs}, reverse=True):
            waiting = [pair for pair in pairs if self.scores[pair[0]] - self.scores[pair[1]] == margin]
            while waiting:
                chosen = min(waiting, key=lambda pair: (used.get(pair[0], 0) + used.get(pair[1], 0), rank[pair[0]], rank[pair[1]]))
                waiting.remove(chosen)
                ranked.append(chosen)
                for i in chosen:
                    used[i] = used.get(i, 0) + 1
        return ranked


@dataclass(frozen=True)
class Paired:
    """What was made: counts, and the rows that could not be read."""

    num_prompts: int
    num_without: int  # prompts of which nothing was written
    num_rows: int
    faults: list[str]


def groups_of(source: DataSource, candidates: Sequence[Candidate], malformed: Literal["refuse", "skip"]) -> tuple[list[Group], list[str]]:
    """The responses of a file by prompt, and its malformed rows.

    A row holds `responses` and `scores`, or one `response` and its `score`, or what `candidates` name. Raises `DataError`.
    """
    groups: dict[str, Group] = {}

    def take(_: Any, row: Row) -> None:
        row = _renamed(row, source.columns)
        prompt = required(row, "prompt")
        if not isinstance(prompt, (str, list)):
            raise LineFault(f"'prompt' is {kind_of(prompt)}; expected text or messages")
        found = [(_text(response), score) for response, score in _scored(row, candidates)]
        rest = {key: row[key] for key in ("answer", "pass_rate") if key in row}
        group = groups.setdefault(json.dumps(prompt, sort_keys=True), Group(prompt, rest))
        for response, score in found:
            group.add(response, score)

    read = read_rows(source.path, take, source.split, malformed)
    return list(groups.values()), read.faults


def write_groups(groups: Sequence[Group], faults: list[str], out: Path, form: Form, per_prompt: int) -> Paired:
    """Write JSON lines. Raises `DataError` when nothing could be written, or the file is there already."""
    rows = [list(group.rows(form, per_prompt)) for group in groups]
    made = Paired(len(groups), sum(not found for found in rows), sum(map(len, rows)), faults)
    if made.num_rows == 0:
        raise DataError(f"{made.num_prompts} prompts, and none with responses of different scores; expected several responses to a prompt")
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for found in rows for row in found)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); expected the name of a new file") from error
    return made


def _scored(row: Row, candidates: Sequence[Candidate]) -> list[tuple[Any, float]]:
    if candidates:
        return [candidate.of(row) for candidate in candidates]
    if "responses" not in row:
        return [(required(row, "response"), _number(required(row, "score"), "score"))]
    responses, scores = row["responses"], required(row, "scores")
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise LineFault("'responses' and 'scores' are not lists of one length")
    return [(response, _number(score, "scores")) for response, score in zip(responses, scores)]


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    return row | {name: _inside(row, column) for name, column in columns.items()}


def _inside(row: Row, name: str) -> Any:
    """The value under a name, or under a dotted name inside objects."""
    if name in row or "." not in name:
        return required(row, name)
    first, _, rest = name.partition(".")
    inner = required(row, first)
    if not isinstance(inner, dict):
        raise LineFault(f"'{first}' is {kind_of(inner)}; expected an object with '{rest}'")
    return _inside(inner, rest)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, (bool, int, float)) or value != value:
        raise LineFault(f"'{name}' is {kind_of(value)}; expected a number, true or false")
    return float(value)


def _text(response: Any) -> str:
    return text_field({"response": response}, "response")
