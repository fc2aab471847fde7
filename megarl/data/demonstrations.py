"""Demonstrations to imitate: prompt and response, or a chat whose assistant turns are learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.config import LessonData
from megarl.data.jsonl import LineFault, messages_field, read_rows, text_field
from megarl.data.order import Purpose, contiguous_share, rows_at, step_share
from megarl.data.packing import Cost
from megarl.data.prompts import overlong_message
from megarl.data.tokenizers import Message, Tokenizer
from megarl.errors import DataError
from megarl.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Demonstration:
    """One sequence and which of its tokens are learned (`loss_mask`, same length)."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


class DemonstrationSet:
    """The demonstrations of one JSONL file. `num_skipped` and `num_truncated` say what the over-long policy did.

    Raises `DataError` with every malformed line, or the number of over-long rows under the policy `refuse`.
    """

    def __init__(self, config: LessonData, tokenizer: Tokenizer, is_eval: bool = False):
        self.num_skipped = 0
        self.num_truncated = 0
        self._config = config
        path = config.eval_path if is_eval else config.path
        if path is None:
            raise ValueError("an evaluation set needs data.eval_path")
        lines = read_rows(path, lambda line, row: (line, read_demonstration(row, tokenizer, config.chat_template)))
        limit = config.max_tokens
        overlong = [line for line, row in lines if len(row.token_ids) > limit]
        if overlong and config.overlong == "refuse":
            raise DataError(overlong_message(path, overlong, limit, "data.max_tokens", "skip or truncate"))
        self.demonstrations = [kept for _, row in lines if (kept := self._fit(row, limit)) is not None]
        if not self.demonstrations:
            raise DataError(f"{path}: no demonstration with a response fits data.max_tokens={limit}; raise it")

    def __len__(self) -> int:
        return len(self.demonstrations)

    def for_step(self, step: int, batch_size: int, seed: int, layout: ParallelLayout, cost: Cost | None = None) -> list[Demonstration]:
        """This data rank's part of the global batch of step `step`, a function of (seed, position): equally many rows, or equal `cost`."""
        rows = [self.demonstrations[i] for i in rows_at(step * batch_size, batch_size, len(self), seed, Purpose.DEMONSTRATIONS)]
        lengths = [[len(row.token_ids)] for row in rows]
        return [rows[i] for i in step_share(lengths, layout, "train.batch_size", cost)]

    def shard(self, layout: ParallelLayout) -> list[Demonstration]:
        """This data rank's part of the whole file in file order, for evaluation; sizes differ by at most one."""
        return self.demonstrations[contiguous_share(len(self), layout)]

    def _fit(self, row: Demonstration, limit: int) -> Demonstration | None:
        if len(row.token_ids) <= limit:
            return row
        # A cut that leaves nothing to learn is a skip.
        if self._config.overlong == "skip" or not any(row.loss_mask[:limit]):
            self.num_skipped += 1
            return None
        self.num_truncated += 1
        return Demonstration(row.token_ids[:limit], row.loss_mask[:limit])


def read_demonstration(row: dict[str, Any], tokenizer: Tokenizer, chat_template: bool) -> Demonstration:
    """A JSONL object as tokens and mask. The response ends with the end-of-text token, which is learned too."""
    if chat_template:
        if "messages" in row:
            messages = messages_field(row, "messages")
        else:
            messages = [
                {"role": "user", "content": text_field(row, "prompt")},
                {"role": "assistant", "content": text_field(row, "response")},
            ]
        return mask_assistant_turns(messages, tokenizer)
    if "prompt" not in row and "messages" in row:
        raise LineFault("the line holds 'messages'; set data.chat_template=true to render them")
    prompt = tokenizer.encode_prompt(text_field(row, "prompt"))
    response = tokenizer.encode(text_field(row, "response")) + [tokenizer.eos_id]
    return Demonstration((*prompt, *response), (False,) * len(prompt) + (True,) * len(response))


def mask_assistant_turns(messages: Sequence[Message], tokenizer: Tokenizer) -> Demonstration:
    """A chat as the model will meet it, assistant turns marked.

    Turn i is what the template adds after the generation prompt of the chat before it, up to and with its last end-of-text
    token; so each longer rendering must start with the shorter one. Raises `LineFault` for templates where it does not
    (those that rewrite earlier turns), because then training would show other tokens than the rollout does.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise LineFault("'messages' has no assistant turn to learn")
    render = _line_faults(tokenizer.render_chat)
    whole = render(list(messages), False)
    mask = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(list(messages[:i]), True), render(list(messages[: i + 1]), False)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise LineFault(
                f"the chat template renders message {i} differently inside a longer chat, so its tokens cannot be marked;"
                " use a template that only appends, or one turn a line"
            )
        if i == len(messages) - 1 and tokenizer.eos_id not in after[len(before) :]:
            whole, mask = [*whole, tokenizer.eos_id], [*mask, False]
            after = whole
        end = max((p + 1 for p in range(len(before), len(after)) if after[p] == tokenizer.eos_id), default=len(after))
        mask[len(before) : end] = [True] * (end - len(before))
    return Demonstration(tuple(whole), tuple(mask))


def _line_faults(render: Callable[[list[Message], bool], list[int]]) -> Callable[[list[Message], bool], list[int]]:
    """`render` with a template's refusal turned into a fault of the line."""

    def rendered(messages: list[Message], add_generation_prompt: bool) -> list[int]:
        try:
            return render(messages, add_generation_prompt)
        except DataError as error:
            raise LineFault(str(error)) from error

    return rendered
