"""From the reward of a response to the number that is credited: clip, running scale, penalty for no end of text. Pure.

Axis letter: b sequences. Semantics section 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.config import PpoConfig


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of all rewards seen so far. Part of what a checkpoint keeps of a run's progress."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def joined(self, count: float, total: float, squares: float) -> "Moments":
        """With `count` more rewards, given their sum and their sum of squares (Chan et al. 1979)."""
        if count == 0:
            return self
        mean, everybody = total / count, self.count + count
        apart = (mean - self.mean) ** 2 * self.count * count / everybody
        return Moments(
            everybody,
            self.mean + (mean - self.mean) * count / everybody,
            self.squares + max(squares - count * mean**2, 0.0) + apart,
        )

    @property
    def deviation(self) -> float:
        """The unbiased standard deviation; 1 as long as all rewards were equal."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 and self.squares > 0 else 1.0


NOTHING_SEEN = Moments()


def clip_rewards(rewards: Tensor, config: PpoConfig) -> Tensor:
    """Rewards within `reward_clip`: f32[b] from f32[b]."""
    return rewards if config.reward_clip is None else rewards.clamp(-config.reward_clip, config.reward_clip)


def power_sums(rewards: Tensor) -> Tensor:
    """f64[3]: how many, their sum, the sum of their squares; what `Moments.joined` takes once ranks have added theirs."""
    rewards = rewards.double()
    return torch.stack([rewards.new_tensor(float(len(rewards))), rewards.sum(), rewards.square().sum()])


def shape_rewards(rewards: Tensor, truncated: Tensor, config: PpoConfig, seen: Moments) -> Tensor:
    """The reward that each response is credited with: f32[b] from `rewards` f32[b] and `truncated` bool[b].

    In order: the clip; `reward_scale`, by the moments of all clipped rewards so far, this rollout's included; `missing_eos_penalty` off a
    response that the length limit cut. Source: semantics section 1; the running scale is trlx's, the penalty TRL's.
    """
    rewards = clip_rewards(rewards, config)
    if config.reward_scale != "none":
        rewards = (rewards - (seen.mean if config.reward_scale == "normal" else 0.0)) / seen.deviation
    return rewards - config.missing_eos_penalty * truncated
