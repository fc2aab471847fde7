"""Reward model training: the preferred response of a pair shall score higher. `megarl reward CONFIG`

The loss is -log sigmoid(score of the chosen - score of the rejected), scores read at the last token (semantics section 5; Ouyang et al.
2022, equation 1), mean over the pairs of the whole batch.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.checkpoint.train_state import TrainState
from megarl.config import RewardRun
from megarl.course.lesson import TOKENS_MULTIPLE, Lesson, build_parts, teach
from megarl.data.batching import collate_preferences
from megarl.data.preferences import Preference, PreferenceSet
from megarl.metrics import Metric, Metrics
from megarl.models.token_stats import ScoreHead
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.pipeline import LossFunction
from megarl.records import PreferenceBatch

HEADLINE = {"loss": "loss", "accuracy": "pair_accuracy", "held-out accuracy": "eval/pair_accuracy"}


def train_reward(run: RewardRun, layout: ParallelLayout) -> TrainState:
    """Train a reward model on preference pairs. Called by every rank after `groups.initialize`; returns the last state."""
    return teach(run, layout, build_parts("reward", run, layout, "reward", PreferenceSet, Comparison, HEADLINE))


class Comparison(Lesson):
    """The lesson of preference pairs."""

    def __init__(self, pad_id: int):
        self.head = ScoreHead()
        self._pad_id = pad_id

    def collate(self, examples: Sequence[Preference]) -> PreferenceBatch:
        return collate_preferences(examples, self._pad_id, TOKENS_MULTIPLE)

    def weight(self, batch: PreferenceBatch) -> Tensor:
        return torch.tensor(float(len(batch)), dtype=torch.float64)

    def loss_function(self, denominator: float) -> LossFunction:
        return partial(comparison_loss, denominator=denominator)


def comparison_loss(scores: Tensor, rows: PreferenceBatch, denominator: float) -> tuple[Tensor, Metrics]:
    """-log sigmoid(chosen - rejected) summed over the pairs, over `denominator`; and means over the pairs.

    Shapes: `scores` f32[2 B], those of the chosen of all pairs and then of the rejected. Pairs of length 0 are padding and count nothing.
    """
    is_pair = rows.chosen_lengths > 0
    chosen, rejected = scores.chunk(2)
    margin = chosen - rejected
    loss = torch.where(is_pair, -F.logsigmoid(margin), 0.0).sum()
    count = is_pair.sum().double()
    seen = {"loss": -F.logsigmoid(margin), "pair_accuracy": margin > 0, "margin": margin, "score": (chosen + rejected) / 2}
    return loss / denominator, Metrics({name: Metric(values.detach()[is_pair].double().sum(), count) for name, values in seen.items()})
