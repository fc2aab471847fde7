"""From completions to rewards: what a scorer promises, and the weighted sum of several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megarl.data.tokenizers import Tokenizer
from megarl.errors import RewardError
from megarl.records import Completion, Prompt, Trajectory


class Scorer(Protocol):
    """One kind of judgement.

    `score` gets three lists of equal length, entry i about one sample: the prompt, the completion, and the completion's text up
    to end-of-text. It returns one finite number a sample. A scorer that runs a distributed model is called on every rank.
    """

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True)
class Term:
    """A scorer's place in the sum. `name` is its key in `Trajectory.reward_parts`, which holds the score before weighting."""

    name: str
    weight: float
    scorer: Scorer


@dataclass(frozen=True)
class WeightedSum:
    """The reward of a run: sum of weight x score over its terms."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        assert names and len(set(names)) == len(names), f"reward terms need distinct names: {names}"

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[Completion], tokenizer: Tokenizer) -> list[Trajectory]:
        """Trajectories, entry i from prompt i and completion i (a prompt is repeated for each of its samples).

        Raises `RewardError` when a scorer returns the wrong number of scores or one that is not finite.
        """
        assert len(prompts) == len(completions), f"{len(prompts)} prompts for {len(completions)} completions"
        texts = [tokenizer.decode_response(completion.token_ids) for completion in completions]
        columns = {term.name: _checked(term, term.scorer.score(prompts, completions, texts), completions) for term in self.terms}
        trajectories = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            parts = {name: column[i] for name, column in columns.items()}
            reward = sum(term.weight * parts[term.name] for term in self.terms)
            trajectories.append(Trajectory(prompt, completion, reward, parts))
        return trajectories


def distinct_names(kinds: Sequence[str]) -> list[str]:
    """A name for each reward part of a configuration: its kind, numbered from the second of a kind on (`model`, `model_2`)."""
    names: list[str] = []
    for i, kind in enumerate(kinds):
        earlier = list(kinds[:i]).count(kind)
        names.append(f"{kind}_{earlier + 1}" if earlier else kind)
    return names


def _checked(term: Term, scores: list[float], completions: Sequence[Completion]) -> list[float]:
    if len(scores) != len(completions):
        raise RewardError(f"reward {term.name} returned {len(scores)} scores for {len(completions)} completions")
    for completion, score in zip(completions, scores, strict=True):
        if not math.isfinite(score):
            raise RewardError(
                f"reward {term.name} gave {score} to completion {completion.sample_index} of prompt {completion.prompt_id};"
                " expected a finite number"
            )
    return [float(score) for score in scores]
