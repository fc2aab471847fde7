"""Text that the policy imitates while it learns from rewards: the policy loss + coef * NLL, in one optimizer step (semantics section 3).

Source: InstructGPT's PPO-ptx (Ouyang et al. 2022). The text is read like demonstrations of `megarl sft`.
"""

from functools import partial

import torch
from torch import Tensor

from megarl.config import PtxConfig
from megarl.data.batching import collate_demonstrations
from megarl.data.demonstrations import DemonstrationSet
from megarl.metrics import Metric, Metrics
from megarl.models.learner import Pass
from megarl.models.token_stats import LogprobHead
from megarl.parallel import device, groups
from megarl.parallel.collectives import sum_over
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.microbatches import Packing
from megarl.records import DemonstrationBatch

TOKENS_MULTIPLE = 8  # T is a multiple of this: aligned for tensor cores


class NoPtx:
    """A run without."""

    def passes(self, step: int, packing: Packing | None) -> list[Pass]:
        """None."""
        return []


class Ptx:
    """The text's part of every policy update. Args: `logits_bytes` as for other heads; `pad_id` fills rows up."""

    def __init__(self, config: PtxConfig, examples: DemonstrationSet, pad_id: int, logits_bytes: int, seed: int, layout: ParallelLayout):
        self._config, self._examples, self._pad_id, self._seed, self._layout = config, examples, pad_id, seed, layout
        self._head = LogprobHead(logits_bytes, mask_field="loss_mask")

    def passes(self, step: int, packing: Packing | None) -> list[Pass]:
        """What the policy's optimizer step `step` adds: the next `batch_size` rows, a function of the step alone. Called by every rank.

        Divided by the learned tokens of all data ranks. Temperature 1: it is text, not samples.
        """
        cost = None if packing is None else packing.cost
        rows = self._examples.for_step(step, self._config.batch_size, self._seed, self._layout, cost)
        batch = collate_demonstrations(rows, self._pad_id, TOKENS_MULTIPLE)
        batch.loss_mask[:, 0] = False  # nothing predicts the first token
        count = sum_over(batch.loss_mask.sum().double().to(device.device()), groups.group(self._layout, "dp")).clamp(min=1)
        return [Pass(batch, self._head, partial(ptx_loss, coef=self._config.coef, denominator=count))]


def ptx_loss(logprobs: Tensor, rows: DemonstrationBatch, coef: float, denominator: Tensor) -> tuple[Tensor, Metrics]:
    """coef * negative log-likelihood of the learned tokens over `denominator`, and the mean without the coefficient as `ptx_loss`.

    Shapes: `logprobs` f32[B, T], entry t about token t, 0 where `rows.loss_mask` bool[B, T] is False.
    """
    nll = torch.where(rows.loss_mask, -logprobs, 0.0).sum()
    return coef * nll / denominator, Metrics({"ptx_loss": Metric(nll.detach().double(), rows.loss_mask.sum().double())})
