"""RMSNorm for hosts without Transformer Engine: any width, any epsilon, sequence parallelism."""

import torch
from torch import Tensor

from megarl.parallel import device

device.prepare()

from megatron.core.transformer import TransformerConfig  # noqa: E402  (the host is prepared first)


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float32 (Zhang & Sennrich 2019).

    Under sequence parallelism every tensor-parallel rank sees a part of the tokens; the weight is marked so that Megatron sums its
    gradient over those ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device.device()))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in any float type -> the same shape and type."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
