"""What `megarl sample` writes about a prompt: one JSON object, in the layout that lessons and PPO read."""

from collections.abc import Sequence
from typing import Any

from megarl.config import SampleConfig
from megarl.data.tokenizers import Tokenizer
from megarl.records import Prompt, Trajectory


def row_of(
    prompt: Prompt, trajectories: Sequence[Trajectory], config: SampleConfig, has_scores: bool, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The line of one prompt: its responses in the order they were asked for, or the best of them alone (the first of equals).

    `prompt` is text, or a chat of more than a user's message. Lists have an entry a response: text up to end-of-text, tokens with it,
    "stop" or "length", score, and each part of the score.
    """
    row: dict[str, Any] = {"prompt_id": prompt.prompt_id, "prompt": list(prompt.messages) or prompt.text}
    if prompt.answer:
        row["answer"] = prompt.answer
    columns: dict[str, list[Any]] = {
        "responses": [tokenizer.decode_response(t.completion.token_ids) for t in trajectories],
        "num_tokens": [len(t.completion.token_ids) for t in trajectories],
        "finish_reasons": [t.completion.finish_reason for t in trajectories],
    }
    if has_scores:
        columns["scores"] = [t.reward for t in trajectories]
        columns |= {f"scores/{name}": [t.reward_parts[name] for t in trajectories] for name in trajectories[0].reward_parts}
        row["pass_rate"] = sum(t.reward >= config.pass_score for t in trajectories) / len(trajectories)
    if config.keep == "best":
        best = max(range(len(trajectories)), key=lambda i: (trajectories[i].reward, -i))
        return row | {SINGULAR.get(name, name.replace("scores", "score")): column[best] for name, column in columns.items()}
    return row | columns


SINGULAR = {"responses": "response", "num_tokens": "num_tokens", "finish_reasons": "finish_reason"}
