"""Preference pairs: two responses to one prompt, the better one named."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megarl.config import DataSource
from megarl.data.demonstrations import as_turns, mask_assistant_turns
from megarl.data.example_set import LessonSet
from megarl.data.fields import LineFault, number_field, text_field
from megarl.data.order import Purpose
from megarl.data.prompts import in_template
from megarl.data.tokenizers import Message, Tokenizer


@dataclass(frozen=True)
class Preference:
    """Two whole sequences (prompt and response, each ending with end-of-text) that share a prompt.

    `num_prompt_tokens` at their start are the prompt's; `margin` says by how much the chosen one is better (0: nobody said).
    """

    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    num_prompt_tokens: int = 1
    margin: float = 0.0


class PreferenceSet(LessonSet[Preference]):
    """Pairs of `megarl reward` and `megarl dpo`."""

    use, order, unit = "preference", Purpose.PREFERENCES, "pair"

    @property
    def preferences(self) -> list[Preference]:
        """All pairs, in the order of the files."""
        return self.examples

    def parse(self, row: dict[str, Any], source: DataSource) -> Preference:
        return read_preference(row, self._tokenizer, self._config.chat_template, source.template)

    def lengths(self, example: Preference) -> list[int]:
        return [len(example.chosen_ids), len(example.rejected_ids)]

    def cut(self, example: Preference, limit: int) -> Preference | None:
        cut = replace(example, chosen_ids=example.chosen_ids[:limit], rejected_ids=example.rejected_ids[:limit])
        # A cut that makes both sides equal leaves nothing to prefer.
        return None if cut.chosen_ids == cut.rejected_ids else cut


def read_preference(row: dict[str, Any], tokenizer: Tokenizer, chat_template: bool, template: str = "") -> Preference:
    """A row as two sequences. `prompt`, `chosen` and `rejected` are texts, or lists of messages with a chat template.

    Chats may also hold the whole conversation in `chosen` and `rejected` without a `prompt`. `margin` is an optional number.
    """
    if chat_template:
        (chosen, start), (rejected, other) = (_render(row, key, tokenizer) for key in ("chosen", "rejected"))
        num_prompt_tokens = min(start, other)
    else:
        if any(isinstance(row.get(key), list) for key in ("prompt", "chosen", "rejected")):
            raise LineFault("the line holds messages; set data.chat_template=true to render them")
        prompt = tokenizer.encode_prompt(in_template(text_field(row, "prompt"), template))
        chosen, rejected = ((*prompt, *tokenizer.encode(text_field(row, key)), tokenizer.eos_id) for key in ("chosen", "rejected"))
        num_prompt_tokens = len(prompt)
    if tuple(chosen) == tuple(rejected):
        raise LineFault("'chosen' and 'rejected' are the same tokens; a pair needs a difference")
    margin = number_field(row, "margin") if "margin" in row else 0.0
    return Preference(tuple(chosen), tuple(rejected), num_prompt_tokens, margin)


def render_response(before: Sequence[Message], response: Sequence[Message], tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    """A conversation's tokens up to the end of its last turn, and where the response begins (its last turn, when `before` is empty).

    The score is read at the last token; a rollout ends with end-of-text, so what a template puts after it is left out.
    """
    rendered = mask_assistant_turns([*before, *response], tokenizer, learn="last_response")
    learned = [i for i, is_learned in enumerate(rendered.loss_mask) if is_learned]
    start = len(tokenizer.render_chat(list(before), True)) if before else learned[0]
    return rendered.token_ids[: learned[-1] + 1], start


def _render(row: dict[str, Any], key: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], int]:
    before = as_turns(row, "prompt", "user") if "prompt" in row else []
    response = as_turns(row, key, "assistant")
    if response[-1]["role"] != "assistant" or len(before) + len(response) < 2:
        raise LineFault(f"'{key}' must end a conversation with an assistant turn")
    return render_response(before, response, tokenizer)
