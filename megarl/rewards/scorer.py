"""From completions to rewards: what a scorer promises, the weighted sum of several, and the hook behind it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Real
from types import MappingProxyType
from typing import Any, Protocol

from megarl.data.tokenizers import Tokenizer
from megarl.errors import RewardError, error_kinds
from megarl.records import Completion, Prompt, Trajectory


class Scorer(Protocol):
    """One kind of judgement.

    `score` gets three lists of equal length, entry i about one sample: the prompt, the completion, and the completion's text up
    to end-of-text. It returns one finite number a sample. A scorer that runs a distributed model is called on every rank.
    """

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str]) -> list[float]: ...


# Changes the rewards of a data rank's rows: (prompts, completions, texts, rewards, parts before weights) -> rewards.
Hook = Callable[[Sequence[Prompt], Sequence[Completion], Sequence[str], list[float], dict[str, list[float]]], list[float]]
# Does a piece of scoring: (whether one rank of a replica does it for all, the piece) -> its scores.
Run = Callable[[bool, Callable[[], list[float]]], list[float]]

# Scores that were found ahead, by `key_of` what was judged; a kind and a text stand for an error.
Found = Mapping[str, float | list[str]]

UNPROCESSED = "unprocessed"  # the part that keeps the weighted sum where a hook changes it


@dataclass(frozen=True)
class Ahead:
    """How a term is scored while other responses are still being sampled: by so many `threads`, each of which takes up to `most` responses
    at a time; `timeout_s` for what is left when the last one is sampled (None: as long as the ranks wait for one another)."""

    threads: int
    most: int
    timeout_s: float | None = None


@dataclass(frozen=True)
class Term:
    """A scorer's place in the sum. `name` is its key in `Trajectory.reward_parts`, which holds the score before weighting.

    `runs_once`: one rank of a model replica scores for all of them, because scoring costs much or may end differently each time.
    `ahead` None: it is scored when all responses are there.
    """

    name: str
    weight: float
    scorer: Scorer
    runs_once: bool = False
    ahead: Ahead | None = None

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[Completion], texts: Sequence[str], found: Found) -> list[float]:
        """One score a row: those `found` ahead, and what the scorer says about the other rows.

        Raises the error that stands for the first row that has one, else what the scorer raises.
        """
        known = [found.get(key_of(completion)) for completion in completions] if found else [None] * len(completions)
        for entry in known:
            if isinstance(entry, list):
                raise error_kinds()[entry[0]](entry[1])
        rest = [index for index, entry in enumerate(known) if entry is None]
        rows = [[column[index] for index in rest] for column in (prompts, completions, texts)]
        scored = iter(checked(f"reward {self.name}", self.scorer.score(*rows), rows[1]) if rest or not known else [])
        return [next(scored) if entry is None else entry for entry in known]


@dataclass(frozen=True)
class WeightedSum:
    """The reward of a run: sum of weight x score over its terms, then whatever `hook` makes of it."""

    terms: tuple[Term, ...]
    hook: Hook | None = None

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        assert names and len({*names, UNPROCESSED}) == len(names) + 1, f"reward terms need distinct names: {names}"

    def judge(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        tokenizer: Tokenizer,
        run: Run = lambda _, work: work(),
        found: Mapping[str, Found] = MappingProxyType({}),
    ) -> list[Trajectory]:
        """Trajectories, entry i from prompt i and completion i (a prompt is repeated for each of its samples).

        Raises `RewardError` when a scorer or the hook returns the wrong number of scores, or one that is no finite number. Where ranks hold
        the same samples, `run` decides who does the work; pieces come in the order of the terms, the hook last. `found` holds, by
        the terms' names, what was scored ahead.
        """
        assert len(prompts) == len(completions), f"{len(prompts)} prompts for {len(completions)} completions"
        texts = [tokenizer.decode_response(completion.token_ids) for completion in completions]
        columns: dict[str, list[float]] = {}
        for term in self.terms:
            columns[term.name] = run(term.runs_once, lambda t=term: t.scores(prompts, completions, texts, found.get(t.name, {})))
        rewards = [sum(term.weight * columns[term.name][i] for term in self.terms) for i in range(len(prompts))]
        if self.hook is not None:
            parts, hook, columns = dict(columns), self.hook, columns | {UNPROCESSED: rewards}
            rewards = run(True, lambda: checked("reward_hook", hook(prompts, completions, texts, list(rewards), parts), completions))
        return [
            Trajectory(prompt, completion, reward, {name: column[i] for name, column in columns.items()})
            for i, (prompt, completion, reward) in enumerate(zip(prompts, completions, rewards, strict=True))
        ]


def key_of(completion: Completion) -> str:
    """A name for what is judged: the prompt, and the response with its ending."""
    text = repr((completion.prompt_id, completion.token_ids, completion.finish_reason))
    return blake2b(text.encode(), digest_size=12).hexdigest()


def checked(who: str, scores: Any, completions: Sequence[Completion]) -> list[float]:
    """`scores` as floats, one for each completion. Raises `RewardError` naming `who` and the prompt of the first that is no number."""
    if not isinstance(scores, list | tuple):
        raise RewardError(f"{who} returned {_described(scores)}; expected a list of {len(completions)} numbers")
    if len(scores) != len(completions):
        ids = prompt_ids(completions)
        raise RewardError(f"{who} returned {len(scores)} scores for {len(completions)} completions ({ids}); expected one for each")
    for completion, score in zip(completions, scores, strict=True):
        if not isinstance(score, Real) or not math.isfinite(score):
            where = f"completion {completion.sample_index} of prompt {completion.prompt_id}"
            raise RewardError(f"{who} gave {_described(score)} to {where}; expected a finite number")
    return [float(score) for score in scores]


def prompt_ids(completions: Sequence[Completion], most: int = 4) -> str:
    """`prompt 3`, or `prompts 3, 5, ...`: where completions come from, in a few words."""
    ids = list(dict.fromkeys(completion.prompt_id for completion in completions))
    some = ", ".join(map(str, ids[:most])) + (", ..." if len(ids) > most else "")
    return f"prompt{'s' if len(ids) > 1 else ''} {some}"


def _described(value: Any) -> str:
    return str(value) if isinstance(value, Real) else f"{type(value).__name__} {str(value)[:60]!r}"
