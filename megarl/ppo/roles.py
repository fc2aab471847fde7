"""The four models of PPO: actor, critic, reference, reward model. Each is spread over the same ranks, and speaks `[B, T]`.

Every method is called by every rank; `batch` is the part of this rank's data-parallel replica and equal on all its ranks, and so is
every result. Axis letters: B sequences of a data-parallel replica, T tokens of the padded batch.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarl.config import PpoRun, Run, SampleRun, TrainedModelConfig
from megarl.metrics import Largest, Metric, Metrics
from megarl.models.build import build_model
from megarl.models.freezing import freeze_lowest
from megarl.models.guard import UpdateGuard
from megarl.models.head_sharing import sharing_of
from megarl.models.learner import Learner
from megarl.models.pieces import Piece, TensorSource, load_pieces, source_pieces
from megarl.models.replica import Replica, packing_of
from megarl.models.spec import ModelSpec, Role
from megarl.models.token_stats import LogprobHead, PolicyHead, ScoreHead, ValueHead
from megarl.parallel import groups
from megarl.parallel.collectives import sum_over
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Movable
from megarl.ppo.kl import kl_loss
from megarl.ppo.losses import aggregate, correction_weights, count_for, entropy_loss, policy_loss, value_loss
from megarl.ppo.ptx import NoPtx, Ptx
from megarl.records import Experience, RolloutBatch, TokenBatch

NO_PTX = NoPtx()
SKIPPED = "skipped_updates"  # directory in a run's, of batches that nothing was learned from


def build_learner(
    spec: ModelSpec,
    role: Role,
    model: TrainedModelConfig,
    run: Run,
    layout: ParallelLayout,
    source: TensorSource,
    total_steps: int,
    ema_decay: float | None = None,
) -> tuple[Learner, list[Piece]]:
    """A model that learns, with weights from `source`, and its live pieces. Called by every rank.

    `role` is "actor" (vocabulary logits) or "critic" (a scalar head); `total_steps` are the optimizer steps of the whole run; with an
    `ema_decay` the learner keeps a moving average of the weights.
    """
    chunks = build_model(spec, role, run.parallel, run.precision, layout)
    freeze_lowest(chunks, model.frozen_layers)
    name = role if isinstance(run, PpoRun) else "model"
    guard = UpdateGuard(name, model.optimizer, layout, run.output_dir / SKIPPED)
    learner = Learner(chunks, model.optimizer, run.parallel, run.precision, layout, total_steps, ema_decay, guard)
    pieces = source_pieces(learner.chunks, spec.table(role))
    load_pieces(pieces, source)
    learner.refresh_main_params()
    return learner, pieces


def build_frozen(spec: ModelSpec, role: Role, run: Run, layout: ParallelLayout, source: TensorSource) -> tuple[Replica, list[Piece]]:
    """A model that never changes: no gradients, no optimizer. Called by every rank; arguments as for `build_learner`."""
    chunks = build_model(spec, role, run.parallel, run.precision, layout)
    for chunk in chunks:
        chunk.requires_grad_(False)
    pieces = source_pieces(chunks, spec.table(role))
    load_pieces(pieces, source)
    packing, sharing = packing_of(spec, run.parallel), sharing_of(spec, role, run.parallel, layout)
    return Replica(chunks, layout, run.parallel.microbatch_size, packing, sharing), pieces


def num_updates(run: PpoRun, first_step: int = 0) -> int:
    """Optimizer steps of the whole run from step `first_step` on."""
    minibatches = run.rollout.prompts_per_step * run.rollout.samples_per_prompt // run.ppo.minibatch_size
    return max(1, (run.ppo.total_steps - first_step) * run.ppo.num_epochs * minibatches)


class Actor:
    """The policy that is trained. `movables` is what it owns by part, each of which can be offloaded and brought back.

    `ptx` is text that it imitates in every update; `end_ids` are the tokens that it could not choose where a rollout `must_go_on`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        run: PpoRun,
        layout: ParallelLayout,
        source: TensorSource,
        ptx: Ptx | NoPtx = NO_PTX,
        end_ids: tuple[int, ...] = (),
    ):
        total_steps = num_updates(run, run.ppo.critic_warmup_steps)
        self.spec, self.layout, self.ptx, self._ppo = spec, layout, ptx, run.ppo
        ema_decay = None if run.ppo.ema is None else run.ppo.ema.decay
        self.learner, self.pieces = build_learner(spec, "actor", run.actor, run, layout, source, total_steps, ema_decay)
        self.movables = self.learner.movables
        self._max_response_tokens = run.rollout.max_response_tokens
        settings = (run.parallel.logits_bytes, run.rollout.temperature, "response_mask")
        # a mean over each sequence needs all its tokens in one place, and so does its probability
        correction = run.ppo.correction
        is_whole = run.ppo.aggregation == "sequence_mean" or run.ppo.ratio_level == "sequence"
        is_whole = is_whole or (correction.kind != "none" and correction.level == "sequence")
        deals = "rows" if is_whole else "tokens"
        self._scoring_head = LogprobHead(*settings, end_ids=end_ids)
        self._learning_head = PolicyHead(*settings, deals=deals, end_ids=end_ids)

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probabilities of the response tokens under the policy as it is, tempered like the sampler: f32[B, T], 0 elsewhere."""
        return self.learner.forward(batch, self._scoring_head)

    def update(self, minibatch: Experience, kl_coef: float = 0.0) -> Metrics:
        """One optimizer step on this data rank's share of a minibatch (semantics section 3). Reduce the metrics over data ranks.

        `kl_coef` is this step's coefficient, used where `ppo.kl.place` is loss.
        """
        group = groups.group(self.layout, "dp")
        mine = count_for(self._ppo.aggregation, minibatch.response_mask, self._max_response_tokens)
        denominator = sum_over(mine, group).clamp(min=1)
        loss, text = partial(self._loss, denominator, kl_coef), self.ptx.passes(self.learner.num_steps, self.learner.packing)
        return self.learner.step(minibatch, self._learning_head, loss, *text).under("actor")

    def _loss(self, denominator: Tensor, kl_coef: float, stats: tuple[Tensor, Tensor], rows: Experience) -> tuple[Tensor, Metrics]:
        logprobs, entropy = stats
        mask = rows.response_mask
        per_token, seen = policy_loss(logprobs, rows.old_logprobs, rows.advantages, mask, self._ppo)
        extra = Metrics()
        if self._ppo.correction.kind != "none":
            weights, found = correction_weights(rows.old_logprobs, rows.rollout_logprobs, mask, self._ppo.correction)
            per_token, extra = weights * per_token, _correction_metrics(weights, found, mask)
        total = per_token + entropy_loss(entropy, mask, self._ppo.entropy_coef)
        if self._ppo.kl.place == "loss":
            kl = kl_loss(logprobs, rows.ref_logprobs, mask, self._ppo.kl.estimator)
            total, extra = total + kl_coef * kl, extra + Metrics({"kl": _token_mean(kl, mask)})
        metrics = Metrics(
            {
                "loss": _token_mean(per_token, mask),
                "entropy": _token_mean(entropy, mask),
                "clip_fraction": _token_mean(seen["clipped"], mask),
                "old_kl": _token_mean(seen["old_kl"], mask),
                "ratio": _token_mean(seen["ratio"], mask),
                "ratio_max": Largest(seen["ratio"].max()),
            }
        )
        return aggregate(total, mask, self._ppo.aggregation, denominator), metrics + extra


class Critic:
    """The value of every position, trained on the returns. `movables` as for the actor."""

    def __init__(self, spec: ModelSpec, run: PpoRun, layout: ParallelLayout, source: TensorSource):
        self.spec, self.layout, self._value_clip = spec, layout, run.ppo.value_clip
        assert run.critic is not None
        self.learner, self.pieces = build_learner(spec, "critic", run.critic, run, layout, source, num_updates(run))
        self.movables = self.learner.movables
        self._head = ValueHead()

    def values(self, batch: RolloutBatch) -> Tensor:
        """Values before each response token is chosen: f32[B, T], 0 elsewhere."""
        return torch.where(batch.response_mask, self.learner.forward(batch, self._head), 0.0)

    def update(self, minibatch: Experience) -> Metrics:
        """One optimizer step on this data rank's share of a minibatch (semantics section 4). Reduce the metrics over data ranks."""
        tokens = sum_over(minibatch.response_mask.sum().double(), groups.group(self.layout, "dp")).clamp(min=1)
        return self.learner.step(minibatch, self._head, partial(self._loss, tokens)).under("critic")

    def _loss(self, denominator: Tensor, values: Tensor, rows: Experience) -> tuple[Tensor, Metrics]:
        mask = rows.response_mask
        per_token, seen = value_loss(values, rows.values, rows.returns, mask, self._value_clip)
        metrics = Metrics(
            {
                "loss": _token_mean(per_token, mask),
                "clip_fraction": _token_mean(seen["clipped"], mask),
                "value": _token_mean(values, mask),
            }
        )
        return aggregate(per_token, mask, "token_mean", denominator), metrics


class Reference:
    """The frozen policy that the KL penalty is measured against. Of its `movables` there are weights alone.

    With `ppo.reference_refresh` it is not frozen for good: see `ppo.reference`. `end_ids` as for the actor, so that both speak of
    distributions over the same tokens.
    """

    def __init__(
        self, spec: ModelSpec, run: PpoRun | SampleRun, layout: ParallelLayout, source: TensorSource, end_ids: tuple[int, ...] = ()
    ):
        self.spec, self.layout = spec, layout
        self.replica, self.pieces = build_frozen(spec, "actor", run, layout, source)
        is_refreshed = isinstance(run, PpoRun) and run.ppo.reference_refresh is not None
        self.movables = {"weights": Movable(self.replica.weights, "changing" if is_refreshed else "constant")}
        self._head = LogprobHead(run.parallel.logits_bytes, run.rollout.temperature, "response_mask", end_ids=end_ids)

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Log-probabilities of the response tokens, tempered like the sampler: f32[B, T], 0 elsewhere."""
        return self.replica.forward(batch, self._head)

    @torch.no_grad()
    def take(self, actor: Actor) -> None:
        """Become what the actor is now. Called by every rank; nothing is sent, as both lie in one layout."""
        for mine, theirs in zip(self.replica.weights(), actor.learner.weights(), strict=True):
            mine.copy_(theirs)


class RewardModel:
    """A frozen model that gives a whole sequence one number. `movables` as for the reference."""

    def __init__(self, spec: ModelSpec, run: Run, layout: ParallelLayout, source: TensorSource):
        self.spec, self.layout = spec, layout
        self.replica, self.pieces = build_frozen(spec, "critic", run, layout, source)
        self.movables = {"weights": Movable(self.replica.weights, "constant")}
        self._head = ScoreHead()

    def scores(self, batch: TokenBatch) -> Tensor:
        """The score at the last token of every sequence: f32[B]."""
        return self.replica.forward(batch, self._head)


def _correction_metrics(weights: Tensor, found: dict[str, Tensor], mask: Tensor) -> Metrics:
    return Metrics(
        {
            "correction/weight": _token_mean(weights, mask),
            "correction/ratio_max": Largest(found["ratio"].max()),
            "correction/cut_fraction": _token_mean(found["cut"], mask),
        }
    )


def _token_mean(per_token: Any, mask: Tensor) -> Metric:
    return Metric(torch.where(mask, per_token.detach(), 0.0).sum().double(), mask.sum().double())
