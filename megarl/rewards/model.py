"""A trained reward model as a scorer. The model itself stays in its layer: this file only knows a callable."""

from collections.abc import Callable, Sequence

from megarl.records import Completion, Prompt

TokenScores = Callable[[list[list[int]]], list[float]]


class ModelScorer:
    """Scores whole sequences (prompt and response) with `score_tokens`, which returns one number a sequence.

    Every rank of a model replica calls `score` with the same samples when `score_tokens` runs a distributed model.
    """

    def __init__(self, score_tokens: TokenScores):
        self._score_tokens = score_tokens

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        sequences = [[*prompt.token_ids, *completion.token_ids] for prompt, completion in zip(prompts, completions, strict=True)]
        return [float(score) for score in self._score_tokens(sequences)]
