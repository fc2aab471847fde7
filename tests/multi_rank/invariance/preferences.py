"""The lessons of preferences as learners of the suite: DPO, IPO, RRHF and the forms of the reward model, over the same ranked lists."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megarl.config import ComparisonConfig, DpoConfig, PpoRun, RrhfConfig
from megarl.course.dpo import Preferring
from megarl.course.lesson import Lesson
from megarl.course.reward_model import Comparison
from megarl.course.rrhf import Ordering
from megarl.data.preferences import Preference
from megarl.data.rankings import Ranking
from megarl.models.replica import Replica
from megarl.models.token_stats import ResponseHead
from tests.multi_rank.invariance.layouts import VOCAB

PAD_ID = 0
MakeLesson = Callable[[PpoRun, Callable[[], Replica]], Lesson]  # from a run, and what builds the reference


def make_rankings(num_lists: int) -> list[Ranking]:
    """Lists of two to four sequences of 3 to 13 tokens, with scores of which some are equal."""
    generator = torch.Generator().manual_seed(11)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCAB, (count,), generator=generator).tolist())

    def up_to(most: int) -> int:
        return 1 + int(torch.randint(most, (), generator=generator))

    rankings = []
    for number in range(num_lists):
        prompt = tokens(1 + up_to(5))
        responses = tuple((*prompt, *tokens(up_to(7))) for _ in range(2 + number % 3))
        rankings.append(Ranking(responses, tuple(float(up_to(3)) for _ in responses), len(prompt)))
    return rankings


def make_pairs(rankings: Sequence[Ranking]) -> list[Preference]:
    """The first two responses of each list, with margins."""
    margins = torch.rand(len(rankings), generator=torch.Generator().manual_seed(12)).tolist()
    return [
        Preference(ranking.responses[0], ranking.responses[1], ranking.num_prompt_tokens, margin)
        for ranking, margin in zip(rankings, margins, strict=True)
    ]


def _preferring(config: DpoConfig) -> MakeLesson:
    return lambda run, reference: Preferring(config, reference(), ResponseHead(run.parallel.logits_bytes), PAD_ID)


def _comparing(config: ComparisonConfig) -> MakeLesson:
    return lambda run, reference: Comparison(config, PAD_ID)


MAKE_LESSON: Mapping[str, MakeLesson] = {
    "dpo": _preferring(DpoConfig(beta=0.5, label_smoothing=0.1, nll_coef=0.5)),
    "ipo": _preferring(DpoConfig(loss="ipo", beta=0.2)),
    "rrhf": lambda run, reference: Ordering(RrhfConfig(nll_coef=0.5), run.parallel.logits_bytes, PAD_ID),
    "reward with margins": _comparing(ComparisonConfig(margin=True, centring_coef=0.1)),
    "reward over tokens": _comparing(ComparisonConfig(form="tokens", margin=True, centring_coef=0.1)),
}


def examples_for(name: str, num_rows: int) -> list[Any]:
    """What a lesson reads: as many lists or pairs as the suite's batch has rows."""
    rankings = make_rankings(num_rows)
    return rankings if name == "rrhf" else make_pairs(rankings)
