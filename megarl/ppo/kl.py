"""KL between the policy that sampled and the frozen reference: per-token estimators and the coefficient's controllers. Pure.

Axis letters: B sequences, T tokens of the padded batch. Semantics section 1.
"""

from typing import Literal

import torch
from torch import Tensor

from megarl.config import KlConfig

Estimator = Literal["k1", "abs", "k2", "k3"]


def kl_estimate(old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """One-sample estimates of KL(policy || reference) at every response token.

    Shapes: `old_logprobs`, `ref_logprobs` f32[B, T], `mask` bool[B, T]; returns f32[B, T], 0 where the mask is False.
    Source: semantics section 1; k1, k2 and k3 after Schulman, "Approximating KL Divergence" (2020).
    """
    difference = torch.where(mask, old_logprobs - ref_logprobs, 0.0)  # log of policy over reference
    if estimator == "k1":
        return difference
    if estimator == "abs":
        return difference.abs()
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise AssertionError(f"unknown KL estimator {estimator}")


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator) -> Tensor:
    """`kl_estimate` of the policy as it learns, as a loss of every response token: gradients flow into `logprobs`.

    The gradient of k1 itself is 0 on average, so k1 has its value and the gradient of k2 (straight-through).
    Shapes: as for `kl_estimate`. Source: semantics section 3; Shao et al. (2024) put k3 there.
    """
    if estimator != "k1":
        return kl_estimate(logprobs, ref_logprobs, mask, estimator)
    value, slope = (kl_estimate(logprobs, ref_logprobs, mask, name) for name in ("k1", "k2"))
    return slope + (value - slope).detach()


def kl_of_sequences(kl: Tensor, mask: Tensor) -> Tensor:
    """Mean over the response tokens of each sequence: f32[B] from `kl` f32[B, T]; 0 for a sequence without response tokens."""
    return (kl * mask).sum(1) / mask.sum(1).clamp(min=1)


def next_kl_coef(kl_coef: float, observed_kl: float, num_sequences: int, config: KlConfig) -> float:
    """The coefficient of the next rollout: unchanged without a target, else the proportional controller of Ziegler et al. (2019).

    `observed_kl` is the mean over sequences of `kl_of_sequences`, `num_sequences` the sequences of the whole rollout.
    Source: semantics section 1.
    """
    if config.target is None:
        return kl_coef
    error = min(max(observed_kl / config.target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_sequences / config.horizon)
