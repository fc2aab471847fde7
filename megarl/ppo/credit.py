"""Credit assignment: what every model says about a rollout becomes advantages and returns. The pure parts plus one global reduction.

Axis letters: B sequences of one data-parallel replica, T tokens of the padded batch. Semantics sections 1 and 2.
"""

from dataclasses import fields
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megarl.config import PpoConfig
from megarl.errors import RolloutError
from megarl.parallel import collectives
from megarl.ppo.advantages import gae, token_rewards, whiten
from megarl.ppo.kl import kl_estimate
from megarl.records import Experience, RolloutBatch


def assign_credit(
    rollout: RolloutBatch,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    config: PpoConfig,
    kl_coef: float,
    group: ProcessGroup,
) -> Experience:
    """Token rewards, GAE and whitening. Called by every rank; `group` is its data-parallel group.

    Shapes: three f32[B, T] from actor, reference and critic. `kl_coef` is the coefficient of this step (TrainState), not the start value.
    """
    mask = rollout.response_mask
    old_logprobs, ref_logprobs, values = (torch.where(mask, t, 0.0) for t in (old_logprobs, ref_logprobs, values))
    kl = kl_estimate(old_logprobs, ref_logprobs, mask, config.kl.estimator)
    rewards = token_rewards(rollout.rewards, kl, mask, kl_coef, config.reward_clip)
    advantages, returns = gae(rewards, values, mask, rollout.truncated, config.gamma, config.lam, config.bootstrap_truncated)
    if config.whiten:
        advantages = whiten(advantages, mask, partial(collectives.sum_over, group=group))
    return Experience(
        **{f.name: getattr(rollout, f.name) for f in fields(rollout)},
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        token_rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def check_parity(rollout: RolloutBatch, old_logprobs: Tensor, tolerance: float, group: ProcessGroup) -> None:
    """Stops the run when sampler and trainer disagree about the tokens just sampled. Called by every rank of the data-parallel group.

    Compares the mean |rollout_logprobs - old_logprobs| over all response tokens of the step with `tolerance` (nats).
    Raises `RolloutError` on all ranks alike. The same number is logged as `rollout/logprob_gap`.
    """
    mask = rollout.response_mask
    gap = torch.where(mask, rollout.rollout_logprobs - old_logprobs, 0.0).abs()
    total, tokens = collectives.sum_over(torch.stack([gap.double().sum(), mask.sum().double()]), group).tolist()
    mean = total / max(tokens, 1.0)
    if not mean <= tolerance:  # also when it is not a number
        raise RolloutError(
            f"sampler and trainer differ by {mean:.4f} nats a token on average; expected at most rollout.parity_tolerance = {tolerance}."
            " Likely causes: the sampler did not get the newest weights (bridge), a model family table that maps a tensor wrongly,"
            " different rope or norm settings, another dtype (precision), or a temperature applied on one side only"
        )
