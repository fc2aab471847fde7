"""From rewards to advantages: token rewards, generalized advantage estimation, whitening. Pure.

Axis letters: B sequences, T tokens of the padded batch. Entry t speaks about token t: `values[:, t]` is the value *before*
token t is chosen. Semantics sections 1 and 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def last_true(mask: Tensor) -> Tensor:
    """bool[B, T] that is True only at the last True position of each row of `mask` bool[B, T] (nowhere in an empty row)."""
    following = mask.flip(1).cumsum(1).flip(1)
    return mask & (following == 1)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards of single tokens: `-kl_coef * kl` everywhere and the sequence's reward on its last response token.

    Shapes: `rewards` f32[B], `kl` f32[B, T], `mask` bool[B, T]; returns f32[B, T], 0 where the mask is False.
    Source: semantics section 1; Ouyang et al. (2022).
    """
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(last_true(mask), rewards[:, None].to(kl.dtype), 0.0)


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, truncated: Tensor, gamma: float, lam: float, bootstrap_truncated: bool
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: (advantages, returns), both before whitening.

    The value after the last response token is 0; with `bootstrap_truncated` a sequence that the length limit cut uses its last
    value instead. Masked tokens inside a response carry the next value and the running advantage across unchanged.
    Shapes: `token_rewards`, `values` f32[B, T], `mask` bool[B, T], `truncated` bool[B]; returns two f32[B, T], 0 where the mask is False.
    Source: semantics section 2; Schulman et al. (2016).
    """
    last_value = torch.where(last_true(mask), values, 0.0).sum(1)
    next_value = last_value * truncated if bootstrap_truncated else torch.zeros_like(last_value)
    running = torch.zeros_like(last_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        chosen = mask[:, t]
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(chosen, delta + gamma * lam * running, running)
        next_value = torch.where(chosen, values[:, t], next_value)
        advantages[:, t] = torch.where(chosen, running, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(advantages: Tensor, mask: Tensor, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """Advantages with mean 0 and variance 1 over the response tokens of the whole rollout.

    `all_sum` adds a small float64 vector over all data-parallel ranks (the identity on one rank); it is called once, so every rank
    must call this. Unbiased variance, 1e-8 under the root. A lone token becomes 0.
    Shapes: f32[B, T], bool[B, T] -> f32[B, T], 0 where the mask is False. Source: semantics section 2.
    """
    chosen = torch.where(mask, advantages, 0.0).double()
    count, total, squares = all_sum(torch.stack([mask.sum().double(), chosen.sum(), chosen.square().sum()])).unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    return torch.where(mask, ((chosen - mean) / (variance + 1e-8).sqrt()).to(advantages.dtype), 0.0)
