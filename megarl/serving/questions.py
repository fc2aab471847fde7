"""What a request asks: texts to score, checked at the door, then as the tokens that the lessons would make of them.

Request, as `rewards.remote` sends it and OpenRLHF's `remote_rm_url` gets it: {"query": [prompt + response, ...], "prompts": [...],
"labels": [...]}. A reward model needs no labels. Without `prompts` a query is read as one text.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megarl.errors import DataError

if TYPE_CHECKING:
    from megarl.data.tokenizers import Tokenizer


class Refusal(Exception):
    """The request gets no scores: HTTP `status`, and one line that says what was found and what was expected."""

    def __init__(self, status: int, line: str):
        super().__init__(" ".join(line.split()))
        self.status = status


@dataclass(frozen=True)
class Question:
    """One text to score: a response behind its `prompt`; the whole text is the response where no prompt came with it."""

    prompt: str
    response: str
    has_prompt: bool


def read_questions(content: bytes, most: int) -> list[Question]:
    """The questions of a request's body. Raises `Refusal` 400 for one that is malformed, 413 for more than `most` queries."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:  # of the encoding, of JSON, and of what is nested without end
        raise Refusal(400, f"the body is not JSON ({type(error).__name__}); {_EXPECTED}") from None
    if not isinstance(body, dict) or "query" not in body:
        raise Refusal(400, f"the body is {_named(body)} without query; {_EXPECTED}")
    queries, prompts = body["query"], body.get("prompts")
    _check_texts("query", queries)
    if not queries:
        raise Refusal(400, "query is empty; expected at least one text")
    if len(queries) > most:
        raise Refusal(413, f"query holds {len(queries)} texts; expected at most {most} a request (--max-queries)")
    if prompts is None:
        return [Question("", query, False) for query in queries]
    _check_texts("prompts", prompts)
    if len(prompts) != len(queries):
        raise Refusal(400, f"prompts holds {len(prompts)} texts for {len(queries)} queries; expected one for each, or no prompts")
    return [
        Question(prompt, query[len(prompt) :], True) if query.startswith(prompt) else Question("", query, False)
        for query, prompt in zip(queries, prompts, strict=True)
    ]


@dataclass(frozen=True)
class Texts:
    """Questions as tokens: prompt, response and end-of-text, each encoded as in preference pairs and rollouts.

    With `chat_template` the prompt is a user's message and stands in the tokenizer's template. At most `max_tokens` a question.
    """

    tokenizer: "Tokenizer"
    max_tokens: int
    chat_template: bool = False

    def tokens(self, questions: list[Question]) -> list[list[int]]:
        """One row a question. Raises `Refusal` that names the first question that is no row."""
        return [self._row(f"query {index}", question) for index, question in enumerate(questions)]

    def _row(self, name: str, question: Question) -> list[int]:
        ids = self._prompt(name, question)
        ids += self.tokenizer.encode(question.response) if question.has_prompt else self.tokenizer.encode_prompt(question.response)
        if self.tokenizer.bos_id is not None and ids[:2] == [self.tokenizer.bos_id] * 2:  # the text spells it
            del ids[0]
        if ids[-1:] != [self.tokenizer.eos_id]:
            ids.append(self.tokenizer.eos_id)
        if len(ids) > self.max_tokens:
            raise Refusal(413, f"{name} has {len(ids)} tokens; expected at most {self.max_tokens} (--max-tokens)")
        return ids

    def _prompt(self, name: str, question: Question) -> list[int]:
        if not self.chat_template:
            return self.tokenizer.encode_prompt(question.prompt) if question.has_prompt else []
        if not question.has_prompt:
            raise Refusal(400, f"{name} does not begin with a prompt of its own; expected prompts, which --chat-template renders")
        try:
            return self.tokenizer.render_chat([{"role": "user", "content": question.prompt}], add_generation_prompt=True)
        except DataError as error:
            raise Refusal(400, f"{name}: {error}") from None


_EXPECTED = 'expected {"query": [text, ...], "prompts": [text, ...]}'


def _check_texts(key: str, texts: Any) -> None:
    if not isinstance(texts, list):
        raise Refusal(400, f"{key} is {_named(texts)}; expected a list of texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refusal(400, f"{key} {index} is {_named(text)}; expected a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refusal(400, f"{key} {index} holds half of a surrogate pair; expected Unicode text") from None


def _named(value: Any) -> str:
    """The JSON type of `value`, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
