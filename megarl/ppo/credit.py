"""Credit assignment: what every model says about a rollout becomes advantages and returns. The pure parts plus one global reduction.

The rows of a data-parallel replica are dealt to its pipeline stages, samples of one prompt together: each shapes the token rewards of its
rows and estimates their advantages. Whitening sums over all rows of all replicas; then the stages gather what they found, 4 bytes a token.

Axis letters: B sequences of one data-parallel replica, b of one of its stages, T tokens of the padded batch. Semantics sections 1 and 2.
"""

from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from megarl.config import PpoConfig
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.advantages import token_rewards, whiten
from megarl.ppo.algorithms import ADVANTAGES
from megarl.ppo.estimators import ESTIMATORS, Earnings, group_size
from megarl.ppo.kl import kl_estimate
from megarl.ppo.reward_shaping import NOTHING_SEEN, Moments, clip_rewards, power_sums, shape_rewards
from megarl.records import Experience, RolloutBatch


def assign_credit(
    rollout: RolloutBatch,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    config: PpoConfig,
    kl_coef: float,
    layout: ParallelLayout,
    rewards_seen: Moments = NOTHING_SEEN,
) -> Experience:
    """Token rewards, advantages and whitening, the same on all ranks of a replica. Called by every rank.

    Shapes: three f32[B, T] from actor, reference and critic. `kl_coef` is the coefficient of this step (TrainState), not the start value;
    `rewards_seen` are the moments that `ppo.reward_scale` scales by, this rollout included (`observe_rewards`).
    """
    mask = rollout.response_mask
    old_logprobs, ref_logprobs, values = (torch.where(mask, t, 0.0) for t in (old_logprobs, ref_logprobs, values))
    mine = stage_rows(len(rollout), layout, group_size(rollout.group_ids))
    own, own_mask = rollout.rows(mine), mask[mine]
    kl = kl_estimate(old_logprobs[mine], ref_logprobs[mine], own_mask, config.kl.estimator)
    credited = shape_rewards(own.rewards, own.truncated, config, rewards_seen)
    rewards = token_rewards(credited, kl, own_mask, kl_coef if config.kl.place == "reward" else 0.0)
    baselines = shape_rewards(own.baselines, own.baseline_truncated, config, rewards_seen)
    earned = Earnings(rewards, values[mine], own_mask, own.truncated, own.group_ids, baselines)
    advantages, returns = ESTIMATORS[config.advantage](earned, config)
    if ADVANTAGES[config.advantage].whitens if config.whiten is None else config.whiten:
        advantages = whiten(advantages, own_mask, partial(_sum_over_rows, layout=layout))
    found = collectives.gather_rows(torch.stack([rewards, advantages, returns], dim=1), groups.group(layout, "pp"))  # [b, 3, T]
    rewards, advantages, returns = (tensor.contiguous() for tensor in found.unbind(1))
    return Experience(
        **{f.name: getattr(rollout, f.name) for f in fields(rollout)},
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        token_rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def observe_rewards(seen: Moments, rollout: RolloutBatch, config: PpoConfig, layout: ParallelLayout) -> Moments:
    """The moments of the run's clipped rewards with those of this rollout, of all replicas. Called by every rank."""
    if config.reward_scale == "none":
        return seen
    sums = collectives.sum_over(power_sums(clip_rewards(rollout.rewards, config)), groups.group(layout, "dp"))
    return seen.joined(*sums.tolist())


def stage_rows(num_rows: int, layout: ParallelLayout, together: int = 1) -> slice:
    """The rows of a replica that this pipeline stage owns: contiguous, in runs of `together`; sizes differ by at most one such run."""
    runs = num_rows // together
    first, last = (runs * stage // layout.pipeline for stage in (layout.pp_rank, layout.pp_rank + 1))
    return slice(first * together, last * together)


def _sum_over_rows(tensor: Tensor, layout: ParallelLayout) -> Tensor:
    """The sum over everybody who owns rows: the stages of all replicas. Called by every rank."""
    for axis in ("dp", "pp"):
        tensor = collectives.sum_over(tensor, groups.group(layout, axis))
    return tensor
