"""Prompts for rollouts: read, tokenised and checked once, then dealt in an order that is a function of (seed, epoch) and the position."""

from dataclasses import replace
from typing import Any

from megarl.config import DataSource, PromptData
from megarl.data.example_set import ExampleSet
from megarl.data.fields import LineFault, answer_field, check_messages, messages_field, number_field, text_field
from megarl.data.order import Purpose, contiguous_share, equal_share
from megarl.data.tokenizers import Message, Tokenizer
from megarl.parallel.layout import ParallelLayout
from megarl.records import Prompt


class PromptSet(ExampleSet[Prompt]):
    """The prompts of a run or of a held-out set. A prompt's `prompt_id` is its place among those that were kept.

    Args: `needs_answers` makes a row without an answer a fault (an exact verifier needs one).
    """

    use, order, unit = "prompt", Purpose.PROMPTS, "prompt"
    limit_key, policies = "max_prompt_tokens", "skip or truncate_left"

    def __init__(self, config: PromptData, tokenizer: Tokenizer, needs_answers: bool = False):
        self._needs_answers = needs_answers
        self._bounds = config.min_pass_rate, config.max_pass_rate
        super().__init__(config, config.files(), tokenizer)

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts, in the order of the files."""
        return self.examples

    def from_position(self, position: int, count: int, seed: int, layout: ParallelLayout) -> list[Prompt]:
        """This data rank's contiguous part of the `count` prompts after the first `position` of the run; epochs follow without a gap."""
        share = equal_share(count, layout, "rollout.prompts_per_step")
        return [self.prompts[i] for i in self.mixture.rows_at(position, count, seed, self.order)[share]]

    def find(self, prompt_id: int) -> Prompt | None:
        """The prompt of that number; None where there is none."""
        return self.prompts[prompt_id] if 0 <= prompt_id < len(self.prompts) else None

    def first(self, count: int, layout: ParallelLayout) -> list[Prompt]:
        """This data rank's part of the first `count` prompts in file order (fewer where the file is shorter), for evaluation."""
        prompts = self.prompts[:count]
        return prompts[contiguous_share(len(prompts), layout)]

    def parse(self, row: dict[str, Any], source: DataSource) -> Prompt | None:
        if self._bounds != (0.0, 1.0) and not self._bounds[0] <= number_field(row, "pass_rate") <= self._bounds[1]:
            return None
        answer = answer_field(row, "answer") if self._needs_answers or "answer" in row else ""
        conversation: list[Message] = []
        if self._config.chat_template:
            messages = _messages(row)
            conversation = messages if [message["role"] for message in messages] != ["user"] else []
            token_ids, text = self._tokenizer.render_chat(messages, add_generation_prompt=True), messages[-1]["content"]
        else:
            if isinstance(row.get("prompt"), list) or "prompt" not in row and "messages" in row:
                raise LineFault(f"the line holds '{'prompt' if 'prompt' in row else 'messages'}' as a chat; set data.chat_template=true")
            text = text_field(row, "prompt")
            token_ids = self._tokenizer.encode_prompt(in_template(text, source.template))
        if not token_ids:
            raise LineFault("the prompt has no tokens")
        return Prompt(prompt_id=-1, token_ids=tuple(token_ids), answer=answer, text=text, messages=tuple(conversation))

    def lengths(self, example: Prompt) -> list[int]:
        return [len(example.token_ids)]

    def cut(self, example: Prompt, limit: int) -> Prompt:
        token_ids = example.token_ids
        starts_with_bos = token_ids[0] == self._tokenizer.bos_id and limit > 1
        kept = token_ids[:1] + token_ids[len(token_ids) - limit + 1 :] if starts_with_bos else token_ids[len(token_ids) - limit :]
        return replace(example, token_ids=kept)

    def numbered(self, example: Prompt, number: int) -> Prompt:
        return replace(example, prompt_id=number)


def in_template(prompt: str, template: str) -> str:
    """The prompt in its place in data.template."""
    return template.replace("{}", prompt) if template else prompt


def _messages(row: dict[str, Any]) -> list[Message]:
    if "messages" in row:
        messages, key = messages_field(row, "messages"), "messages"
    elif isinstance(row.get("prompt"), list):
        messages, key = check_messages(row["prompt"], "prompt"), "prompt"
    else:
        return [{"role": "user", "content": text_field(row, "prompt")}]
    if messages[-1]["role"] == "assistant":
        raise LineFault(f"'{key}' ends with the assistant; a prompt ends with the message to answer")
    return messages
