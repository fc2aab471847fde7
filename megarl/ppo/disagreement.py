"""What the pattern of a disagreement between sampler and trainer says about its cause. Pure.

Axis letters: B sequences of one data-parallel replica, T tokens of the padded batch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = 8  # of a padded row, first to last
FEW = 0.1  # a part of the tokens that counts as few
MOST = 0.9  # a part of the gap that counts as most of it


@dataclass(frozen=True)
class Disagreement:
    """Sums over the response tokens of one data-parallel replica. d is the trainer's minus the sampler's log-probability."""

    num_tokens: int
    num_undefined: int  # d is no finite number; such tokens count nowhere else
    num_off: int  # |d| over the tolerance
    gap: float  # sum of |d|
    gap_off: float  # of those tokens
    moments: tuple[float, float, float, float, float]  # sums of s, t, s s, t t, s t: the sampler's and the trainer's log-probability
    gap_by_part: tuple[float, ...]  # by eighth of the padded row, f64[8]
    tokens_by_part: tuple[int, ...]

    @classmethod
    def of(cls, rollout_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, tolerance: float) -> "Disagreement":
        """Shapes: three [B, T], `mask` bool."""
        difference = (old_logprobs - rollout_logprobs).double()
        is_counted = mask & difference.isfinite()
        s, t, gap = (tensor[is_counted].double() for tensor in (rollout_logprobs, old_logprobs, difference.abs()))
        part_of = (torch.arange(mask.shape[1], device=mask.device) * PARTS // mask.shape[1]).expand_as(mask)[is_counted]
        is_off = gap > tolerance
        return cls(
            num_tokens=int(is_counted.sum()),
            num_undefined=int((mask & ~is_counted).sum()),
            num_off=int(is_off.sum()),
            gap=float(gap.sum()),
            gap_off=float(gap[is_off].sum()),
            moments=tuple(float(tensor.sum()) for tensor in (s, t, s * s, t * t, s * t)),
            gap_by_part=tuple(torch.bincount(part_of, weights=gap, minlength=PARTS).tolist()),
            tokens_by_part=tuple(torch.bincount(part_of, minlength=PARTS).tolist()),
        )

    @property
    def mean(self) -> float:
        return self.gap / max(1, self.num_tokens)

    def __add__(self, other: "Disagreement") -> "Disagreement":
        def add(a, b):
            return tuple(map(add, a, b)) if isinstance(a, tuple) else a + b

        return Disagreement(*(add(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Disagreement":
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})


def likely_causes(replicas: Sequence[Disagreement], tolerance: float, num_passed: int) -> list[str]:
    """Sentences about what may be wrong, likeliest first; never empty.

    Args: `replicas` one entry a data-parallel replica, `tolerance` of the mean gap in nats, `num_passed` comparisons before this one
    that found nothing.
    """
    whole = sum(replicas[1:], start=replicas[0])
    causes = [*_undefined(whole), *_some_replicas(replicas, tolerance), *_stale(num_passed)]
    if whole.num_tokens:
        causes += [*_late_positions(whole, tolerance), *_few_tokens(whole), *_scale_and_shift(whole, tolerance)]
    return causes or [_other_weights(), _rounding()]


def _undefined(whole: Disagreement) -> list[str]:
    if not whole.num_undefined:
        return []
    return [f"{whole.num_undefined} log-probabilities are no numbers: weights or activations overflowed, after a learning rate too high"]


def _some_replicas(replicas: Sequence[Disagreement], tolerance: float) -> list[str]:
    wrong = [index for index, replica in enumerate(replicas) if replica.num_undefined or replica.mean > tolerance]
    if not wrong or len(wrong) == len(replicas):
        return []
    names = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
    return [f"only the samples of data ranks {names} of {len(replicas)} are off: their generators hold other weights than the rest"]


def _stale(num_passed: int) -> list[str]:
    if num_passed == 0:
        return []
    return [
        f"{num_passed} earlier comparisons were fine: the newest weight sync did not reach all that the sampler computes with (packed or"
        " derived copies, a prefix cache of the old weights)"
    ]


def _late_positions(whole: Disagreement, tolerance: float) -> list[str]:
    means = [gap / tokens for gap, tokens in zip(whole.gap_by_part, whole.tokens_by_part) if tokens]
    if len(means) < 3 or means[0] > tolerance or means[-1] < max(tolerance, 5 * means[0]):
        return []
    return [
        f"the gap grows along the sequence ({means[0]:.2g} to {means[-1]:.2g} nats): rotary settings (rope_theta, rope_scaling), a sliding"
        " window, or how positions are numbered"
    ]


def _few_tokens(whole: Disagreement) -> list[str]:
    share = whole.num_off / whole.num_tokens
    if not 0 < share < FEW or whole.gap_off < MOST * whole.gap:
        return []
    return [
        f"{share:.1%} of the tokens make up nearly all of the gap: some rows of embedding or output layer, a cut response whose end one"
        " side does not read, or routers of a mixture that choose other experts"
    ]


def _scale_and_shift(whole: Disagreement, tolerance: float) -> list[str]:
    """Least squares of the trainer's log-probability over the sampler's: t = slope s + shift."""
    n = whole.num_tokens
    s, t, ss, tt, st = (moment / n for moment in whole.moments)
    variance_s, variance_t, covariance = ss - s * s, tt - t * t, st - s * t
    if variance_s <= 0 or variance_t <= 0:  # one side calls everything equally likely
        return [_other_weights()]
    correlation, slope = covariance / math.sqrt(variance_s * variance_t), covariance / variance_s
    spread = math.sqrt(max(0.0, variance_s + variance_t - 2 * covariance))  # of d
    if abs(t - s) > max(tolerance, 5 * spread):
        ratio = math.exp(min(t - s, 50.0))
        return [
            f"every probability is off by the same factor, {ratio:.3g}: the softmax of one side counts other tokens (padding of the"
            " vocabulary), or a shift of the logits"
        ]
    if correlation > 0.9 and abs(slope - 1) > 0.05:
        return [
            f"the trainer's log-probabilities are about {slope:.2f} times the sampler's: rollout.temperature (or a scale or soft cap of the"
            " logits) is applied on one side only"
        ]
    return [_rounding()] if correlation > 0.9 else [_other_weights()]


def _other_weights() -> str:
    return (
        "the two sides do not follow each other: other weights (the family's table maps a tensor wrongly, or the sync filled another"
        " layer), or another norm or rotary setting"
    )


def _rounding() -> str:
    return (
        "all tokens are off a little: another precision (dtype, TF32, the KV cache's type) or other kernels; if that is wanted, raise"
        " rollout.parity_tolerance, and let ppo.correction weigh it"
    )
