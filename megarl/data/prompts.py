"""Prompts for rollouts: read, tokenised and checked once, then dealt in an order that is a function of (seed, epoch) and the position."""

from pathlib import Path
from typing import Any

from megarl.config import PromptData
from megarl.data.jsonl import LineFault, answer_field, messages_field, read_rows, text_field
from megarl.data.order import Purpose, contiguous_share, equal_share, rows_at
from megarl.data.tokenizers import Tokenizer
from megarl.errors import DataError
from megarl.parallel.layout import ParallelLayout
from megarl.records import Prompt


class PromptSet:
    """The prompts of one JSONL file. `num_skipped` and `num_truncated` say what the over-long policy did.

    Args: `needs_answers` makes a line without an answer a fault (an exact verifier needs one).
    Raises `DataError` with every malformed line, or the number of over-long prompts under the policy `refuse`.
    """

    def __init__(self, config: PromptData, tokenizer: Tokenizer, needs_answers: bool = False):
        self.num_skipped = 0
        self.num_truncated = 0
        self._config = config
        self._tokenizer = tokenizer
        self._needs_answers = needs_answers
        lines = read_rows(config.path, lambda line, row: (line, self._parse(row)))
        self.prompts = self._fit(lines)

    def __len__(self) -> int:
        return len(self.prompts)

    def from_position(self, position: int, count: int, seed: int, layout: ParallelLayout) -> list[Prompt]:
        """This data rank's contiguous part of the `count` prompts after the first `position` of the run; epochs follow without a gap."""
        share = equal_share(count, layout, "rollout.prompts_per_step")
        return [self.prompts[i] for i in rows_at(position, count, len(self.prompts), seed, Purpose.PROMPTS)[share]]

    def first(self, count: int, layout: ParallelLayout) -> list[Prompt]:
        """This data rank's part of the first `count` prompts in file order (fewer where the file is shorter), for evaluation."""
        prompts = self.prompts[:count]
        return prompts[contiguous_share(len(prompts), layout)]

    def _parse(self, row: dict[str, Any]) -> Prompt:
        config = self._config
        answer = answer_field(row, config.answer_key) if self._needs_answers or config.answer_key in row else ""
        if config.chat_template:
            messages = (
                messages_field(row, "messages") if "messages" in row else [{"role": "user", "content": text_field(row, config.prompt_key)}]
            )
            if messages[-1]["role"] == "assistant":
                raise LineFault("'messages' ends with the assistant; a prompt ends with the message to answer")
            token_ids, text = self._tokenizer.render_chat(messages, add_generation_prompt=True), messages[-1]["content"]
        else:
            if config.prompt_key not in row and "messages" in row:
                raise LineFault("the line holds 'messages'; set data.chat_template=true to render them")
            text = text_field(row, config.prompt_key)
            token_ids = self._tokenizer.encode_prompt(text)
        if not token_ids:
            raise LineFault("the prompt has no tokens")
        return Prompt(prompt_id=-1, token_ids=tuple(token_ids), answer=answer, text=text)

    def _fit(self, lines: list[tuple[int, Prompt]]) -> list[Prompt]:
        limit, policy = self._config.max_prompt_tokens, self._config.overlong
        overlong = [line for line, prompt in lines if len(prompt.token_ids) > limit]
        if overlong and policy == "refuse":
            raise DataError(overlong_message(self._config.path, overlong, limit, "data.max_prompt_tokens", "skip or truncate_left"))
        prompts = []
        for _, prompt in lines:
            token_ids = prompt.token_ids
            if len(token_ids) > limit:
                if policy == "skip":
                    self.num_skipped += 1
                    continue
                self.num_truncated += 1
                token_ids = self._keep_end(token_ids, limit)
            prompts.append(Prompt(len(prompts), token_ids, prompt.answer, prompt.text))
        if not prompts:
            raise DataError(f"{self._config.path}: all {len(lines)} prompts are longer than data.max_prompt_tokens={limit}; raise it")
        return prompts

    def _keep_end(self, token_ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
        starts_with_bos = token_ids[0] == self._tokenizer.bos_id and limit > 1
        return token_ids[:1] + token_ids[len(token_ids) - limit + 1 :] if starts_with_bos else token_ids[len(token_ids) - limit :]


def overlong_message(path: Path, lines: list[int], limit: int, key: str, policies: str) -> str:
    """One line: how many rows of `path` exceed `limit` tokens, the first of them, and the two ways out."""
    some = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    return f"{path}: {len(lines)} lines longer than {key}={limit} tokens (lines {some}); raise {key} or set data.overlong to {policies}"
