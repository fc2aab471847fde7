"""Preference pairs: two responses to one prompt, the better one named."""

from dataclasses import dataclass
from typing import Any

from megarl.config import LessonData
from megarl.data.demonstrations import Demonstration, mask_assistant_turns
from megarl.data.jsonl import LineFault, check_messages, read_rows, required, text_field
from megarl.data.order import Purpose, contiguous_share, rows_at, step_share
from megarl.data.packing import Cost
from megarl.data.prompts import overlong_message
from megarl.data.tokenizers import Message, Tokenizer
from megarl.errors import DataError
from megarl.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Preference:
    """Two whole sequences (prompt and response, each ending with end-of-text) that share a prompt."""

    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


class PreferenceSet:
    """The pairs of one JSONL file. `num_skipped` and `num_truncated` say what the over-long policy did.

    Raises `DataError` with every malformed line, or the number of over-long pairs under the policy `refuse`.
    """

    def __init__(self, config: LessonData, tokenizer: Tokenizer, is_eval: bool = False):
        self.num_skipped = 0
        self.num_truncated = 0
        self._config = config
        path = config.eval_path if is_eval else config.path
        if path is None:
            raise ValueError("an evaluation set needs data.eval_path")
        lines = read_rows(path, lambda line, row: (line, read_preference(row, tokenizer, config.chat_template)))
        limit = config.max_tokens
        overlong = [line for line, pair in lines if _longest(pair) > limit]
        if overlong and config.overlong == "refuse":
            raise DataError(overlong_message(path, overlong, limit, "data.max_tokens", "skip or truncate"))
        self.preferences = [kept for _, pair in lines if (kept := self._fit(pair, limit)) is not None]
        if not self.preferences:
            raise DataError(f"{path}: no pair fits data.max_tokens={limit}; raise it")

    def __len__(self) -> int:
        return len(self.preferences)

    def for_step(self, step: int, batch_size: int, seed: int, layout: ParallelLayout, cost: Cost | None = None) -> list[Preference]:
        """This data rank's part of the global batch of step `step`, a function of (seed, position): equally many pairs, or equal `cost`."""
        pairs = [self.preferences[i] for i in rows_at(step * batch_size, batch_size, len(self), seed, Purpose.PREFERENCES)]
        lengths = [[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]
        return [pairs[i] for i in step_share(lengths, layout, "train.batch_size", cost)]

    def shard(self, layout: ParallelLayout) -> list[Preference]:
        """This data rank's part of the whole file in file order, for evaluation; sizes differ by at most one."""
        return self.preferences[contiguous_share(len(self), layout)]

    def _fit(self, pair: Preference, limit: int) -> Preference | None:
        if _longest(pair) <= limit:
            return pair
        cut = Preference(pair.chosen_ids[:limit], pair.rejected_ids[:limit])
        # A cut that makes both sides equal leaves nothing to prefer.
        if self._config.overlong == "skip" or cut.chosen_ids == cut.rejected_ids:
            self.num_skipped += 1
            return None
        self.num_truncated += 1
        return cut


def read_preference(row: dict[str, Any], tokenizer: Tokenizer, chat_template: bool) -> Preference:
    """A JSONL object as two sequences. `prompt`, `chosen` and `rejected` are texts, or lists of messages with a chat template.

    Chats may also hold the whole conversation in `chosen` and `rejected` without a `prompt`.
    """
    if chat_template:
        chosen, rejected = (_render(row, key, tokenizer) for key in ("chosen", "rejected"))
    else:
        if any(isinstance(row.get(key), list) for key in ("prompt", "chosen", "rejected")):
            raise LineFault("the line holds messages; set data.chat_template=true to render them")
        prompt = tokenizer.encode_prompt(text_field(row, "prompt"))
        chosen, rejected = ((*prompt, *tokenizer.encode(text_field(row, key)), tokenizer.eos_id) for key in ("chosen", "rejected"))
    if tuple(chosen) == tuple(rejected):
        raise LineFault("'chosen' and 'rejected' are the same tokens; a pair needs a difference")
    return Preference(tuple(chosen), tuple(rejected))


def _render(row: dict[str, Any], key: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    messages = _as_messages(row, "prompt", "user") if "prompt" in row else []
    turns = [*messages, *_as_messages(row, key, "assistant")]
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise LineFault(f"'{key}' must end a conversation with an assistant turn")
    return _up_to_end_of_turn(mask_assistant_turns(turns, tokenizer))


def _as_messages(row: dict[str, Any], key: str, role: str) -> list[Message]:
    if isinstance(required(row, key), str):
        return [{"role": role, "content": text_field(row, key)}]
    return check_messages(row[key], key)


def _up_to_end_of_turn(rendered: Demonstration) -> tuple[int, ...]:
    # The score is read at the last token; a rollout ends with end-of-text, so what a template puts after it is left out.
    last = max(i for i, is_learned in enumerate(rendered.loss_mask) if is_learned)
    return rendered.token_ids[: last + 1]


def _longest(pair: Preference) -> int:
    return max(len(pair.chosen_ids), len(pair.rejected_ids))
