"""The losses of PPO, per token, and how tokens become one number. Pure.

Axis letters: B sequences, T tokens of the padded batch. Losses come back per token so that any cut of a minibatch into ranks and
microbatches can be added up: `aggregate` divides by a denominator counted once over the whole minibatch, on all data-parallel
ranks (`count_for` on each, summed). Semantics sections 3 and 4.
"""

from typing import Literal

import torch
from torch import Tensor

from megarl.config import CorrectionConfig, PpoConfig

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum_fixed"]
LARGEST_LOG_RATIO = 20.0  # exp stays finite in every float format


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: PpoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate loss of every response token, and what to watch about it.

    Uses `loss`, `ratio_level`, `clip_low`, `clip_high` and `dual_clip` of `config`. Gradients flow into `logprobs` only. With
    `ratio_level` sequence the ratio of every token is that of its response: exp of the mean log-ratio (rows must be whole).
    Shapes: four [B, T] (mask bool); returns f32[B, T] and detached f32[B, T] diagnostics, all 0 where the mask is False:
    `ratio` new over old probability, `clipped` 1 where the clip decides, `old_kl` k3 estimate of KL(old || new), token by token.
    Source: semantics section 3; Schulman et al. (2017); sequence ratio after Zheng et al. (2025), GSPO.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    moved = log_ratio
    if config.ratio_level == "sequence":
        moved = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(log_ratio)
    ratio = moved.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages, 0.0)
    loss, clipped = SURROGATES[config.loss](ratio, torch.where(mask, logprobs, 0.0), advantages, config)
    with torch.no_grad():
        chosen = mask.to(ratio.dtype)
        diagnostics = {
            "ratio": ratio.detach() * chosen,
            "clipped": clipped.to(ratio.dtype) * chosen,
            "old_kl": (torch.expm1(log_ratio.detach().clamp(max=LARGEST_LOG_RATIO)) - log_ratio.detach()) * chosen,
        }
    return loss, diagnostics


def clipped_surrogate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """PPO's loss and where its clip decides, [B, T]. Source: Schulman et al. (2017); dual clip after Ye et al. (2020)."""
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(free, held)
    if config.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -config.dual_clip * advantages), loss)
    return loss, held > free


def clipped_weights(ratio: Tensor, logprobs: Tensor, advantages: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """CISPO: log-prob times advantage and the clipped ratio as a number, so that every token keeps a gradient; and where the clip decides.

    Source: MiniMax-M1 (2025), equation 4.
    """
    weights = ratio.detach().clamp(1 - config.clip_low, 1 + config.clip_high)
    return -weights * advantages * logprobs, weights != ratio.detach()


SURROGATES = {"clip": clipped_surrogate, "cispo": clipped_weights}


def correction_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: CorrectionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the policy loss of every response token is multiplied with because another program sampled it than the one that learns.

    w is the trainer's over the sampler's probability of a token, or of a whole response (`level` sequence: rows must be whole).
    `tis` takes min(w, high); `mask` takes w, but 0 outside low to high. Denominators of the loss stay those of all response tokens.
    Shapes: three [B, T] (mask bool); returns f32[B, T] without gradient and the diagnostics `ratio` (w before it is cut) and `cut` (1 where
    it was), f32[B, T]; all 0 where the mask is False. Source: semantics section 3; truncated importance sampling after Ionides (2008).
    """
    assert config.kind != "none"
    with torch.no_grad():
        log_ratio = torch.where(mask, old_logprobs - rollout_logprobs, 0.0)
        if config.level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
        chosen = mask.to(log_ratio.dtype)
        ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp() * chosen
        if config.kind == "tis":
            return ratio.clamp(max=config.high), {"ratio": ratio, "cut": (ratio > config.high).to(chosen.dtype)}
        is_outside = ((ratio < config.low) | (ratio > config.high)) & mask
        return torch.where(is_outside, 0.0, ratio), {"ratio": ratio, "cut": is_outside.to(chosen.dtype)}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of every response token, the worse of free and clipped, and what to watch about it.

    `value_clip` None means no clipping. Gradients flow into `values` only. Aggregate with `token_mean`.
    Shapes: four [B, T] (mask bool); returns f32[B, T] and the detached diagnostic `clipped` f32[B, T], 0 where the mask is False.
    Source: semantics section 4; the clip is OpenAI baselines' (Engstrom et al. 2020 study it).
    """
    error = torch.where(mask, values - returns, 0.0).square()
    if value_clip is None:
        return error / 2, {"clipped": torch.zeros_like(error)}
    held = torch.maximum(torch.minimum(values, old_values + value_clip), old_values - value_clip)
    held_error = torch.where(mask, held - returns, 0.0).square()
    return torch.maximum(error, held_error) / 2, {"clipped": (held_error > error).to(error.dtype)}


def entropy_loss(entropy: Tensor, mask: Tensor, coef: float) -> Tensor:
    """Minus the entropy bonus of every response token, to be added to the policy loss.

    Shapes: `entropy` f32[B, T] in nats, `mask` bool[B, T]; returns f32[B, T], 0 where the mask is False. Source: semantics section 3.
    """
    return torch.where(mask, -coef * entropy, 0.0)


def count_for(aggregation: Aggregation, mask: Tensor, fixed_length: int) -> Tensor:
    """This rank's part of the denominator of `aggregate`, f64 scalar: sum it over all data-parallel ranks of the minibatch.

    Response tokens for `token_mean`; sequences that have a response for `sequence_mean`; those times `fixed_length` (the length
    limit of a response, tokens) for `sequence_sum_fixed`. `mask` bool[B, T] covers the rank's whole share of the minibatch.
    """
    if aggregation == "token_mean":
        return mask.sum().double()
    sequences = mask.any(1).sum().double()
    if aggregation == "sequence_mean":
        return sequences
    if aggregation == "sequence_sum_fixed":
        return sequences * fixed_length
    raise AssertionError(f"unknown aggregation {aggregation}")


def aggregate(token_losses: Tensor, mask: Tensor, aggregation: Aggregation, denominator: Tensor | float) -> Tensor:
    """What these sequences add to the loss of the minibatch (scalar). The sum over all pieces of the minibatch is the loss.

    `denominator` is the sum of `count_for` over the whole minibatch: never the count of this piece alone.
    Shapes: `token_losses` f32[B, T], `mask` bool[B, T]. Source: semantics section 3; `sequence_sum_fixed` after Liu et al. (2025).
    """
    token_losses = torch.where(mask, token_losses, 0.0)
    sums = token_losses.sum(1)
    if aggregation == "sequence_mean":
        sums = sums / mask.sum(1).clamp(min=1)
    return sums.sum() / torch.as_tensor(denominator, dtype=sums.dtype, device=sums.device)
