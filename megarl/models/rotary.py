"""Rotary frequencies: scaled linearly or as Llama 3's, and of two kinds where layers look far and near."""

import math

import torch
from torch import Tensor

from megarl.models.spec import ModelSpec


def rotary_frequencies(spec: ModelSpec) -> Tensor:
    """Radians a position of each pair of a head, f32[head_dim / 2] (Su et al. 2021), divided by a factor or scaled as Llama 3.1 does.

    Llama 3 keeps short waves, divides the frequency of long ones by `factor`, and blends in between. Where local layers have a base of
    their own, f32[head_dim]: those of the other layers, then theirs; `frequencies_of_layer` takes them apart again.
    """
    if spec.window is not None and spec.window.rope_theta is not None:
        return torch.cat([_scaled(spec, _frequencies(spec, spec.rope_theta)), _frequencies(spec, spec.window.rope_theta)])
    return _scaled(spec, _frequencies(spec, spec.rope_theta))


def frequencies_of_layer(rotary: Tensor, is_local: bool) -> Tensor:
    """Angles of both kinds of layers [S, 1, 1, 2 * head_dim], as Megatron repeats frequencies, -> of one kind [S, 1, 1, head_dim]."""
    return rotary.unflatten(-1, (2, 2, -1))[..., int(is_local), :].flatten(-2)


def _frequencies(spec: ModelSpec, theta: float) -> Tensor:
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    return 1.0 / (theta**exponents)


def _scaled(spec: ModelSpec, frequencies: Tensor) -> Tensor:
    if spec.rope_scaling is None:
        return frequencies
    scaling = spec.rope_scaling
    if "low_freq_factor" not in scaling:
        return frequencies / scaling["factor"]
    waves_in_context = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
