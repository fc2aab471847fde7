"""Ranked lists: several responses to one prompt, each with a score."""

from dataclasses import dataclass, replace
from typing import Any

from megarl.config import DataSource
from megarl.data.demonstrations import as_turns
from megarl.data.example_set import LessonSet
from megarl.data.fields import LineFault, kind_of, number_field, required, text_field
from megarl.data.order import Purpose
from megarl.data.preferences import render_response
from megarl.data.prompts import in_template
from megarl.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Ranking:
    """Two or more whole sequences (prompt and response, each ending with end-of-text) and their scores; the higher the better."""

    responses: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]
    num_prompt_tokens: int


class RankingSet(LessonSet[Ranking]):
    """Lists of `megarl rrhf`."""

    use, order, unit = "ranking", Purpose.RANKINGS, "list"

    @property
    def rankings(self) -> list[Ranking]:
        """All lists, in the order of the files."""
        return self.examples

    def parse(self, row: dict[str, Any], source: DataSource) -> Ranking:
        return read_ranking(row, self._tokenizer, self._config.chat_template, source.template)

    def lengths(self, example: Ranking) -> list[int]:
        return [len(response) for response in example.responses]

    def cut(self, example: Ranking, limit: int) -> Ranking | None:
        # A cut that leaves nothing of the responses leaves nothing to rank.
        if example.num_prompt_tokens >= limit:
            return None
        return replace(example, responses=tuple(response[:limit] for response in example.responses))


def read_ranking(row: dict[str, Any], tokenizer: Tokenizer, chat_template: bool, template: str = "") -> Ranking:
    """A row as token sequences: `prompt` (text, or messages with a chat template), `responses` (texts), `scores` (numbers)."""
    responses, scores = _list(row, "responses"), _list(row, "scores")
    if len(responses) != len(scores) or len(responses) < 2:
        raise LineFault(f"{len(responses)} 'responses' and {len(scores)} 'scores'; expected equally many, two or more")
    texts = [text_field({f"responses[{i}]": text}, f"responses[{i}]", allow_empty=True) for i, text in enumerate(responses)]
    numbers = tuple(number_field({f"scores[{i}]": score}, f"scores[{i}]") for i, score in enumerate(scores))
    if not chat_template:
        if isinstance(row.get("prompt"), list):
            raise LineFault("'prompt' holds messages; set data.chat_template=true to render them")
        prompt = tokenizer.encode_prompt(in_template(text_field(row, "prompt"), template))
        sequences = tuple((*prompt, *tokenizer.encode(text), tokenizer.eos_id) for text in texts)
        return Ranking(sequences, numbers, len(prompt))
    before = as_turns(row, "prompt", "user")
    rendered = [render_response(before, [{"role": "assistant", "content": text}], tokenizer) for text in texts]
    return Ranking(tuple(tokens for tokens, _ in rendered), numbers, rendered[0][1])


def _list(row: dict[str, Any], key: str) -> list[Any]:
    value = required(row, key)
    if not isinstance(value, list):
        raise LineFault(f"'{key}' is {kind_of(value)}; expected a list with one entry a response")
    return value
