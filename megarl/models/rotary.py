"""Rotary frequencies, with Llama 3's scaling."""

import math

import torch
from torch import Tensor

from megarl.models.spec import ModelSpec


def rotary_frequencies(spec: ModelSpec) -> Tensor:
    """Radians a position of each pair of a head, f32[head_dim / 2] (Su et al. 2021), scaled as the Llama 3.1 release does.

    Llama 3 keeps short waves, divides the frequency of long ones by `factor`, and blends in between.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    if spec.rope_scaling is None:
        return frequencies
    scaling = spec.rope_scaling
    waves_in_context = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
