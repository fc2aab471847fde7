"""Demonstrations to imitate: prompt and response, or a chat whose assistant turns are learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megarl.config import DataSource
from megarl.data.example_set import LessonSet
from megarl.data.fields import LineFault, check_messages, messages_field, required, text_field
from megarl.data.order import Purpose
from megarl.data.prompts import in_template
from megarl.data.tokenizers import Message, Tokenizer
from megarl.errors import DataError

Learn = Literal["responses", "last_response", "all"]


@dataclass(frozen=True)
class Demonstration:
    """One sequence and which of its tokens are learned (`loss_mask`, same length)."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


class DemonstrationSet(LessonSet[Demonstration]):
    """Demonstrations of `megarl sft`."""

    use, order, unit = "demonstration", Purpose.DEMONSTRATIONS, "demonstration with a response"

    @property
    def demonstrations(self) -> list[Demonstration]:
        """All demonstrations, in the order of the files."""
        return self.examples

    def parse(self, row: dict[str, Any], source: DataSource) -> Demonstration:
        config = self._config
        return read_demonstration(row, self._tokenizer, config.chat_template, config.learn, source.template)

    def lengths(self, example: Demonstration) -> list[int]:
        return [len(example.token_ids)]

    def cut(self, example: Demonstration, limit: int) -> Demonstration | None:
        if not any(example.loss_mask[:limit]):
            return None
        return Demonstration(example.token_ids[:limit], example.loss_mask[:limit])


def read_demonstration(
    row: dict[str, Any], tokenizer: Tokenizer, chat_template: bool, learn: Learn = "responses", template: str = ""
) -> Demonstration:
    """A row as tokens and mask. The response ends with the end-of-text token, which is learned too.

    `text` without a prompt is learned whole, as in pre-training, and only with `learn` all.
    """
    if "text" in row and not row.keys() & {"prompt", "messages", "response"}:
        if learn != "all":
            raise LineFault("a line with 'text' alone has no response to learn; set data.learn=all")
        tokens = [*tokenizer.encode_prompt(text_field(row, "text")), tokenizer.eos_id]
        return Demonstration(tuple(tokens), (True,) * len(tokens))
    if chat_template:
        turns, first = _turns(row)
        return mask_assistant_turns(turns, tokenizer, first, learn)
    for key in ("messages", "prompt", "response"):
        if isinstance(row.get(key), list) and ("prompt" not in row or key != "messages"):
            raise LineFault(f"the line holds '{key}' as a chat; set data.chat_template=true to render it")
    prompt = tokenizer.encode_prompt(in_template(text_field(row, "prompt"), template))
    response = tokenizer.encode(text_field(row, "response")) + [tokenizer.eos_id]
    return Demonstration((*prompt, *response), (learn == "all",) * len(prompt) + (True,) * len(response))


def mask_assistant_turns(messages: Sequence[Message], tokenizer: Tokenizer, first: int = 0, learn: Learn = "responses") -> Demonstration:
    """A chat as the model will meet it, assistant turns marked: those from message `first` on, the last alone, or every token.

    Turn i is what the template adds after the generation prompt of the chat before it, up to and with its last end-of-text
    token; so each longer rendering must start with the shorter one. Raises `LineFault` for templates where it does not
    (those that rewrite earlier turns), because then training would show other tokens than the rollout does.
    """
    wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if not wanted:
        raise LineFault("'messages' has no assistant turn to learn")
    render = _line_faults(tokenizer.render_chat)
    whole = render(list(messages), False)
    mask = [False] * len(whole)
    for i in wanted if learn == "responses" else wanted[-1:]:
        before, after = render(list(messages[:i]), True), render(list(messages[: i + 1]), False)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise LineFault(
                f"the chat template renders message {i} differently inside a longer chat, so its tokens cannot be marked;"
                " use a template that only appends, data.learn=last_response, or one turn a line"
            )
        if i == len(messages) - 1 and tokenizer.eos_id not in after[len(before) :]:
            whole, mask = [*whole, tokenizer.eos_id], [*mask, False]
            after = whole
        end = max((p + 1 for p in range(len(before), len(after)) if after[p] == tokenizer.eos_id), default=len(after))
        mask[len(before) : end] = [True] * (end - len(before))
    return Demonstration(tuple(whole), (True,) * len(whole) if learn == "all" else tuple(mask))


def as_turns(row: dict[str, Any], key: str, role: str) -> list[Message]:
    """What stands under `key`: messages, or one message of `role` made of its text."""
    if isinstance(required(row, key), str):
        return [{"role": role, "content": text_field(row, key)}]
    return check_messages(row[key], key)


def _turns(row: dict[str, Any]) -> tuple[list[Message], int]:
    """A row's conversation, and where what is to be learned begins."""
    if "messages" in row:
        return messages_field(row, "messages"), 0
    prompt = as_turns(row, "prompt", "user")
    return [*prompt, *as_turns(row, "response", "assistant")], len(prompt)


def _line_faults(render: Callable[[list[Message], bool], list[int]]) -> Callable[[list[Message], bool], list[int]]:
    """`render` with a template's refusal turned into a fault of the line."""

    def rendered(messages: list[Message], add_generation_prompt: bool) -> list[int]:
        try:
            return render(messages, add_generation_prompt)
        except DataError as error:
            raise LineFault(str(error)) from error

    return rendered
