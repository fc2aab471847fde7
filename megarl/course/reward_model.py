"""Reward model training: the preferred response of a pair shall score higher. `megarl reward CONFIG`

The loss is -log sigmoid(score of the chosen - score of the rejected), scores read at the last token (semantics section 5; Ouyang et al.
2022, equation 1), mean over the pairs of the whole batch. Options of `comparison`: a margin inside the sigmoid (Touvron et al. 2023),
a term that keeps scores around 0 (Eisenstein et al. 2023), and DeepSpeed-Chat's form over tokens (Yao et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.checkpoint.train_state import TrainState
from megarl.config import ComparisonConfig, LessonData, RewardRun
from megarl.course.lesson import TOKENS_MULTIPLE, Lesson, build_parts, teach
from megarl.data.batching import collate_preferences
from megarl.data.preferences import Preference, PreferenceSet
from megarl.data.tokenizers import Tokenizer
from megarl.errors import DataError
from megarl.metrics import Metric, Metrics
from megarl.models.token_stats import ScoreHead, TokenScoreHead
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.pipeline import LossFunction
from megarl.records import PreferenceBatch

HEADLINE = {"loss": "loss", "accuracy": "pair_accuracy", "held-out accuracy": "eval/pair_accuracy"}


def train_reward(run: RewardRun, layout: ParallelLayout) -> TrainState:
    """Train a reward model on preference pairs. Called by every rank after `groups.initialize`; returns the last state."""
    make_lesson = partial(Comparison, run.comparison)
    return teach(run, layout, build_parts("reward", run, layout, "reward", partial(read_pairs, run.comparison), make_lesson, HEADLINE))


def read_pairs(comparison: ComparisonConfig, data: LessonData, tokenizer: Tokenizer, is_eval: bool = False) -> PreferenceSet:
    """The pairs of a file. Raises `DataError` where margins are wanted and no line has one."""
    pairs = PreferenceSet(data, tokenizer, is_eval=is_eval)
    if comparison.margin and all(pair.margin == 0 for pair in pairs.preferences):
        path = data.eval_path if is_eval else data.path
        raise DataError(f"{path}: no line has a 'margin' other than 0; expected some with comparison.margin true, or set it to false")
    return pairs


class Comparison(Lesson):
    """The lesson of preference pairs."""

    def __init__(self, config: ComparisonConfig, pad_id: int):
        self.head = TokenScoreHead() if config.form == "tokens" else ScoreHead()
        self._config, self._pad_id = config, pad_id

    def collate(self, examples: Sequence[Preference]) -> PreferenceBatch:
        batch = collate_preferences(examples, self._pad_id, TOKENS_MULTIPLE)
        return batch if self._config.margin else replace(batch, margins=torch.zeros_like(batch.margins))

    def weight(self, batch: PreferenceBatch) -> Tensor:
        return torch.tensor(float(len(batch)), dtype=torch.float64)

    def loss_function(self, denominator: float) -> LossFunction:
        judge = token_comparison_loss if self._config.form == "tokens" else comparison_loss
        return partial(judge, denominator=denominator, centring_coef=self._config.centring_coef)


def comparison_loss(scores: Tensor, rows: PreferenceBatch, denominator: float, centring_coef: float = 0.0) -> tuple[Tensor, Metrics]:
    """-log sigmoid(chosen - rejected - margin) summed over the pairs, over `denominator`; and means over the pairs.

    `centring_coef` times the square of the scores' sum is added to each pair's loss. Shapes: `scores` f32[2 B], those of the chosen of all
    pairs and then of the rejected. Pairs of length 0 are padding and count nothing.
    """
    chosen, rejected = scores.chunk(2)
    per_pair = -F.logsigmoid(chosen - rejected - rows.margins)
    return _judged(per_pair, chosen, rejected, rows, denominator, centring_coef)


def token_comparison_loss(scores: Tensor, rows: PreferenceBatch, denominator: float, centring_coef: float = 0.0) -> tuple[Tensor, Metrics]:
    """DeepSpeed-Chat's form: -log sigmoid(chosen - rejected - margin) of every token from the first difference to the end of the longer
    response, mean over a pair's tokens, then as in `comparison_loss`. The shorter response keeps its last score to the end.

    Shapes: `scores` f32[2 B, T], entry t about the sequence up to and with token t.
    """
    positions = torch.arange(scores.shape[1], device=scores.device)
    lengths = (rows.chosen_lengths[:, None], rows.rejected_lengths[:, None])
    chosen, rejected = (
        side.gather(1, torch.minimum(positions, (length - 1).clamp(min=0))) for side, length in zip(scores.chunk(2), lengths)
    )
    is_inside = [positions < length for length in lengths]
    differs = (rows.chosen_ids != rows.rejected_ids) | (is_inside[0] != is_inside[1])
    first = (differs & (is_inside[0] | is_inside[1])).int().argmax(1)
    is_compared = (positions >= first[:, None]) & (is_inside[0] | is_inside[1])
    per_token = torch.where(is_compared, -F.logsigmoid(chosen - rejected - rows.margins[:, None]), 0.0)
    per_pair = per_token.sum(1) / is_compared.sum(1).clamp(min=1)
    return _judged(per_pair, chosen[:, -1], rejected[:, -1], rows, denominator, centring_coef)


def _judged(
    per_pair: Tensor, chosen: Tensor, rejected: Tensor, rows: PreferenceBatch, denominator: float, centring_coef: float
) -> tuple[Tensor, Metrics]:
    """The loss of f32[B] `per_pair`, and what is seen of the scores at the ends."""
    is_pair = rows.chosen_lengths > 0
    margin = chosen - rejected
    loss = torch.where(is_pair, per_pair + centring_coef * (chosen + rejected) ** 2, 0.0).sum()
    count = is_pair.sum().double()
    seen = {"loss": per_pair, "pair_accuracy": margin > 0, "margin": margin, "score": (chosen + rejected) / 2}
    return loss / denominator, Metrics({name: Metric(values.detach()[is_pair].double().sum(), count) for name, values in seen.items()})
