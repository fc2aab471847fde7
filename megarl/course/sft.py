"""Supervised fine-tuning: imitate demonstrated responses. `megarl sft CONFIG`

The loss is the mean negative log-likelihood of the learned tokens of the whole batch (all ranks, all microbatches).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megarl.checkpoint.train_state import TrainState
from megarl.config import SftRun
from megarl.course.lesson import TOKENS_MULTIPLE, Lesson, build_parts, teach
from megarl.data.batching import collate_demonstrations
from megarl.data.demonstrations import Demonstration, DemonstrationSet
from megarl.metrics import Metric, Metrics
from megarl.models.token_stats import LogprobHead
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.pipeline import LossFunction
from megarl.records import DemonstrationBatch

HEADLINE = {"loss": "loss", "held-out": "eval/loss"}


def train_sft(run: SftRun, layout: ParallelLayout) -> TrainState:
    """Fine-tune `run.model` on demonstrations. Called by every rank after `groups.initialize`; returns the last state."""
    parts = build_parts("sft", run, layout, "actor", DemonstrationSet, partial(Imitation, run.parallel.logits_bytes), HEADLINE)
    return teach(run, layout, parts)


class Imitation(Lesson):
    """The lesson of demonstrations."""

    def __init__(self, logits_bytes: int, pad_id: int):
        self.head = LogprobHead(logits_bytes, mask_field="loss_mask")
        self._pad_id = pad_id

    def collate(self, examples: Sequence[Demonstration]) -> DemonstrationBatch:
        batch = collate_demonstrations(examples, self._pad_id, TOKENS_MULTIPLE)
        batch.loss_mask[:, 0] = False  # nothing predicts the first token
        return batch

    def weight(self, batch: DemonstrationBatch) -> Tensor:
        return batch.loss_mask.sum().double()

    def loss_function(self, denominator: float) -> LossFunction:
        return partial(imitation_loss, denominator=denominator)


def imitation_loss(logprobs: Tensor, rows: DemonstrationBatch, denominator: float) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the learned tokens over `denominator`, and its mean over them.

    Shapes: `logprobs` f32[B, T], entry t about token t, 0 where `rows.loss_mask` bool[B, T] is False.
    """
    nll = torch.where(rows.loss_mask, -logprobs, 0.0).sum()
    return nll / denominator, Metrics({"loss": Metric(nll.detach().double(), rows.loss_mask.sum().double())})
