"""Samples for reward tests: prompts and completions as scorers get them."""

from collections.abc import Sequence

from megarl.records import Completion, Prompt


def scorer_rows(
    responses: Sequence[str], answers: Sequence[str] | str = "", finish_reason: str = "stop"
) -> tuple[list[Prompt], list[Completion], list[str]]:
    """Response i to prompt 10 + i, its tokens one a character."""
    answers = [answers] * len(responses) if isinstance(answers, str) else answers
    prompts = [Prompt(10 + i, (1,), answer, f"question {i}: ") for i, answer in enumerate(answers)]
    completions = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = tuple(map(ord, response)) or (0,)
        completions.append(Completion(prompt.prompt_id, 0, ids, (0.0,) * len(ids), finish_reason, 0))
    return prompts, completions, list(responses)
