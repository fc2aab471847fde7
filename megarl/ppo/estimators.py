"""Advantage estimators by name: what a rollout earned becomes an advantage for every response token. Pure.

Axis letters: b sequences, whole groups of samples of one prompt; T tokens of the padded batch. The score of a response is the sum of its
token rewards: the reward, less the KL penalty where that is taken off the reward. Every estimator returns (advantages, returns), both
before whitening and 0 where the mask is False; returns are what a critic learns, and nobody reads them where there is none.
Semantics section 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.config import PpoConfig
from megarl.ppo.advantages import gae, last_true

EPSILON = 1e-6  # added to a group's standard deviation


@dataclass(frozen=True)
class Earnings:
    """What an estimator judges by."""

    token_rewards: Tensor  # f32[b, T], 0 where the mask is False
    values: Tensor  # f32[b, T]; zeros without a critic
    mask: Tensor  # bool[b, T]: tokens the policy chose
    truncated: Tensor  # bool[b]
    group_ids: Tensor  # i64[b]: equal for samples of one prompt, equally many of each
    baselines: Tensor  # f32[b]: what the greedy response to the same prompt earned, shaped alike; zeros where nobody asked for it


Estimator = Callable[[Earnings, PpoConfig], tuple[Tensor, Tensor]]


def group_size(group_ids: Tensor) -> int:
    """Samples of one prompt, from `group_ids` i64[b]: 1 for no rows at all."""
    counts = torch.unique(group_ids, return_counts=True)[1].tolist() or [1]
    assert len(set(counts)) == 1, f"groups of different sizes: {sorted(set(counts))}"
    return counts[0]


def by_group(scores: Tensor, group_ids: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of f32[groups, samples], a row for each prompt, put back where the scores came from: f32[b] from f32[b]."""
    order = torch.argsort(group_ids, stable=True)
    found = torch.empty_like(scores)
    found[order] = change(scores[order].view(-1, group_size(group_ids))).view(-1)
    return found


def less_the_mean(scores: Tensor) -> Tensor:
    """Scores less the mean of their row."""
    return scores - scores.mean(1, keepdim=True)


def less_the_others(scores: Tensor) -> Tensor:
    """Scores less the mean of the others in their row; a lone one becomes 0."""
    others = scores.shape[1] - 1
    return (scores - (scores.sum(1, keepdim=True) - scores) / others) if others else torch.zeros_like(scores)


def in_deviations(scores: Tensor) -> Tensor:
    """Scores less the mean of their row in its unbiased standard deviations; a lone one becomes 0."""
    if scores.shape[1] == 1:
        return torch.zeros_like(scores)
    return less_the_mean(scores) / (scores.std(1, keepdim=True, unbiased=True) + EPSILON)


def discounted(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The discounted sum of token rewards from every response token on, f32[b, T]; tokens outside the mask take no time."""
    zeros = torch.zeros_like(token_rewards)
    return gae(token_rewards, zeros, mask, mask.new_zeros(len(mask)), gamma, 1.0, False)[0]


def _gae(earned: Earnings, config: PpoConfig) -> tuple[Tensor, Tensor]:
    settings = (config.gamma, config.lam, config.bootstrap_truncated)
    return gae(earned.token_rewards, earned.values, earned.mask, earned.truncated, *settings)


def _single_step(earned: Earnings, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """One action a response: its score less the critic's value at the last token; the critic learns the score at every token."""
    scores, mask = earned.token_rewards.sum(1), earned.mask
    baseline = torch.where(last_true(mask), earned.values, 0.0).sum(1)
    return _everywhere(scores - baseline, mask), _everywhere(scores, mask)


def _of_groups(change: Callable[[Tensor], Tensor]) -> Estimator:
    def estimator(earned: Earnings, config: PpoConfig) -> tuple[Tensor, Tensor]:
        advantages = _everywhere(by_group(earned.token_rewards.sum(1), earned.group_ids, change), earned.mask)
        return advantages, advantages

    return estimator


def _remax(earned: Earnings, config: PpoConfig) -> tuple[Tensor, Tensor]:
    advantages = _everywhere(earned.token_rewards.sum(1) - earned.baselines, earned.mask)
    return advantages, advantages


def _reinforce_pp(earned: Earnings, config: PpoConfig) -> tuple[Tensor, Tensor]:
    advantages = discounted(earned.token_rewards, earned.mask, config.gamma)
    return advantages, advantages


def _reinforce_pp_baseline(earned: Earnings, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """The group's mean score leaves at the last token; penalties of single tokens stay where they are."""
    scores = earned.token_rewards.sum(1)
    baseline = scores - by_group(scores, earned.group_ids, less_the_mean)
    rewards = earned.token_rewards - torch.where(last_true(earned.mask), baseline[:, None], 0.0)
    advantages = discounted(rewards, earned.mask, config.gamma)
    return advantages, advantages


def _everywhere(numbers: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, numbers[:, None], 0.0)


ESTIMATORS: dict[str, Estimator] = {
    "gae": _gae,  # Schulman et al. (2016)
    "single_step": _single_step,  # ColossalChat
    "rloo": _of_groups(less_the_others),  # Ahmadian et al. (2024)
    "grpo": _of_groups(in_deviations),  # Shao et al. (2024)
    "dr_grpo": _of_groups(less_the_mean),  # Liu et al. (2025)
    "remax": _remax,  # Li et al. (2024)
    "reinforce_pp": _reinforce_pp,  # Hu et al. (2025)
    "reinforce_pp_baseline": _reinforce_pp_baseline,  # Hu et al. (2025)
}
