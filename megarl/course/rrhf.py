"""Ranked responses: those with higher scores shall be likelier. `megarl rrhf CONFIG`

With p the log-probability of a response over its length to a power, the loss of a list is the sum of max(0, p_i - p_j) over all pairs of
which response i has the lower score, and the negative p of the best response; mean over the lists of the whole batch (semantics
section 5; Yuan et al. 2023, equations 2 to 5). `megarl sample` makes lists from a policy: docs/lessons.md.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megarl.checkpoint.train_state import TrainState
from megarl.config import LessonData, RrhfConfig, RrhfRun
from megarl.course.lesson import TOKENS_MULTIPLE, Lesson, build_parts, teach
from megarl.data.batching import collate_lists
from megarl.data.rankings import Ranking, RankingSet
from megarl.data.tokenizers import Tokenizer
from megarl.errors import DataError
from megarl.metrics import Metric, Metrics
from megarl.models.token_stats import ResponseHead
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.pipeline import LossFunction
from megarl.records import RankedLists

HEADLINE = {"loss": "loss", "accuracy": "pair_accuracy", "held-out accuracy": "eval/pair_accuracy"}


def train_rrhf(run: RrhfRun, layout: ParallelLayout) -> TrainState:
    """Train a policy on ranked lists. Called by every rank after `groups.initialize`; returns the last state."""
    make_lesson = partial(Ordering, run.rrhf, run.parallel.logits_bytes)
    return teach(run, layout, build_parts("rrhf", run, layout, "actor", partial(read_lists, run.rrhf), make_lesson, HEADLINE))


def read_lists(config: RrhfConfig, data: LessonData, tokenizer: Tokenizer, is_eval: bool = False) -> RankingSet:
    """The lists of a file. Raises `DataError` where one is longer than `rrhf.max_responses`."""
    rankings = RankingSet(data, tokenizer, is_eval=is_eval)
    longest = max(len(ranking.responses) for ranking in rankings.rankings)
    if longest > config.max_responses:
        path = data.eval_path if is_eval else data.path
        raise DataError(f"{path}: a list of {longest} responses; expected at most rrhf.max_responses={config.max_responses}: raise it")
    return rankings


class Ordering(Lesson):
    """The lesson of ranked lists."""

    def __init__(self, config: RrhfConfig, logits_bytes: int, pad_id: int):
        self.head = ResponseHead(logits_bytes)
        self._config, self._pad_id = config, pad_id

    def collate(self, examples: Sequence[Ranking]) -> RankedLists:
        starts = [row.num_prompt_tokens for row in examples]
        batch = collate_lists([row.responses for row in examples], starts, self._pad_id, TOKENS_MULTIPLE)
        width = batch.sequences_per_row
        scores = torch.tensor([[*row.scores, *[0.0] * (width - len(row.scores))] for row in examples])
        return RankedLists(batch.token_ids, batch.lengths, batch.response_mask, scores)

    def weight(self, batch: RankedLists) -> Tensor:
        return torch.tensor(float(len(batch)), dtype=torch.float64)

    def loss_function(self, denominator: float) -> LossFunction:
        return partial(ordering_loss, denominator=denominator, config=self._config)


def ordering_loss(logprobs: Tensor, rows: RankedLists, denominator: float, config: RrhfConfig) -> tuple[Tensor, Metrics]:
    """The loss of all lists over `denominator`; means over lists, and over pairs of different scores the share in the right order.

    Shapes: `logprobs` f32[K B] of whole responses, in the order of `rows.sequences()`. Sequences of length 0 are padding and count nothing.
    """
    is_response = rows.lengths > 0
    is_list = is_response[:, 0]
    tokens = rows.response_mask.sum(2).clamp(min=1)
    p = rows.by_row(logprobs) / tokens**config.length_exponent
    is_worse = rows.scores[:, :, None] < rows.scores[:, None, :]  # [B, i, j]: response i has a lower score than j
    is_worse &= is_response[:, :, None] & is_response[:, None, :]
    gap = p[:, :, None] - p[:, None, :]
    ranking = torch.where(is_worse, gap.clamp(min=0), 0.0).sum((1, 2))
    best = rows.scores.masked_fill(~is_response, -torch.inf).argmax(1, keepdim=True)  # the first of the best
    nll = -p.gather(1, best).squeeze(1)
    per_list = torch.where(is_list, ranking + config.nll_coef * nll, 0.0)
    likeliest = p.detach().masked_fill(~is_response, -torch.inf).argmax(1, keepdim=True)
    is_best_likeliest = rows.scores.gather(1, likeliest) == rows.scores.gather(1, best)
    seen = {"loss": per_list, "rank_loss": ranking, "nll": nll, "best_is_likeliest": is_best_likeliest.squeeze(1)}
    metrics = {name: Metric(values.detach()[is_list].double().sum(), is_list.sum().double()) for name, values in seen.items()}
    metrics["pair_accuracy"] = Metric((is_worse & (gap < 0)).sum().double(), is_worse.sum().double())
    return per_list.sum() / denominator, Metrics(metrics)
