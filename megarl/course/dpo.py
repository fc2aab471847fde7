"""Direct preference optimisation: the policy itself learns which response of a pair is better. `megarl dpo CONFIG`

With x = beta times how much more than the reference the policy prefers the chosen response, the loss is -log sigmoid(x) (Rafailov et al.
2023), or (x / beta - 1 / (2 beta))^2 (IPO; Azar et al. 2023), mean over the pairs of the whole batch (semantics section 5). Either looks at
differences alone and may make both responses of a pair less likely; against that stands `dpo.nll_coef` times the chosen response's
negative log-likelihood, over its tokens (Pang et al. 2024, whose coefficient is at the other term; OpenRLHF's nll_loss_coef).

The reference is a frozen model beside the policy and reads every batch as it comes. It costs the memory of its weights and one forward
pass, a quarter of a step. Log-probabilities kept from a first pass over the file would save that from the second epoch on; but they would
have to be checked against data, model and precision at every resume, and whole files are seldom read twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.checkpoint.sources import open_start
from megarl.checkpoint.train_state import TrainState
from megarl.config import DpoConfig, DpoRun
from megarl.course.lesson import TOKENS_MULTIPLE, Lesson, build_parts, teach
from megarl.data.batching import collate_lists
from megarl.data.preferences import Preference, PreferenceSet
from megarl.metrics import Metric, Metrics
from megarl.models.replica import Replica
from megarl.models.token_stats import ResponseHead
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.pipeline import LossFunction
from megarl.ppo.roles import build_frozen
from megarl.records import ReferencedPairs

HEADLINE = {"loss": "loss", "accuracy": "pair_accuracy", "held-out accuracy": "eval/pair_accuracy"}


def train_dpo(run: DpoRun, layout: ParallelLayout) -> TrainState:
    """Train a policy on preference pairs. Called by every rank after `groups.initialize`; returns the last state."""

    def make_lesson(pad_id: int) -> "Preferring":
        model = run.reference or run.model
        spec, source = collectives.together(lambda: open_start(model, "actor", run.seed), groups.group(layout, "world"))
        reference, _ = build_frozen(spec, "actor", run, layout, source)
        return Preferring(run.dpo, reference, ResponseHead(run.parallel.logits_bytes), pad_id)

    return teach(run, layout, build_parts("dpo", run, layout, "actor", PreferenceSet, make_lesson, HEADLINE))


@dataclass(frozen=True)
class Preferring(Lesson):
    """The lesson of preference pairs, for a policy."""

    config: DpoConfig
    reference: Replica
    head: ResponseHead
    pad_id: int

    def collate(self, examples: Sequence[Preference]) -> ReferencedPairs:
        pairs = [(pair.chosen_ids, pair.rejected_ids) for pair in examples]
        starts = [pair.num_prompt_tokens for pair in examples]
        batch = collate_lists(pairs, starts, self.pad_id, TOKENS_MULTIPLE).to(device.device())
        ref_logprobs = batch.by_row(self.reference.forward(batch, self.head))
        return ReferencedPairs(batch.token_ids, batch.lengths, batch.response_mask, ref_logprobs)

    def weight(self, batch: ReferencedPairs) -> Tensor:
        return torch.tensor(float(len(batch)), dtype=torch.float64)

    def loss_function(self, denominator: float) -> LossFunction:
        return partial(preference_loss, denominator=denominator, config=self.config)


def preference_loss(logprobs: Tensor, rows: ReferencedPairs, denominator: float, config: DpoConfig) -> tuple[Tensor, Metrics]:
    """The loss of all pairs over `denominator`, and means over the pairs; a response's reward is beta log(policy / reference).

    With label smoothing e, pairs count as turned round with probability e. `nll` is the chosen response's, a token. `pair_accuracy` asks
    which response gained more against the reference, `likelier_is_chosen` which one is likelier. Shapes: `logprobs` f32[2 B] of whole
    responses, those of the chosen of all pairs and then of the rejected. Pairs of length 0 are padding and count nothing.
    """
    is_pair = rows.lengths[:, 0] > 0
    likely, unlikely = rows.by_row(logprobs).unbind(1)
    gains = rows.by_row(logprobs) - rows.ref_logprobs
    margin = gains[:, 0] - gains[:, 1]
    x = config.beta * margin
    if config.loss == "ipo":
        per_pair = (margin - 1 / (2 * config.beta)) ** 2
    else:
        per_pair = -(1 - config.label_smoothing) * F.logsigmoid(x) - config.label_smoothing * F.logsigmoid(-x)
    nll = -likely / rows.response_mask[:, 0].sum(1).clamp(min=1)
    per_pair = per_pair + config.nll_coef * nll
    chosen, rejected = (config.beta * gains).unbind(1)
    seen = {"loss": per_pair, "pair_accuracy": margin > 0, "margin": x, "reward_chosen": chosen, "reward_rejected": rejected}
    seen |= {"likelier_is_chosen": likely > unlikely, "logprob_chosen": likely, "nll": nll}
    metrics = {name: Metric(values.detach()[is_pair].double().sum(), is_pair.sum().double()) for name, values in seen.items()}
    return torch.where(is_pair, per_pair, 0.0).sum() / denominator, Metrics(metrics)
