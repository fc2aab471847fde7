"""RMSNorm for layers without Transformer Engine: any width, any epsilon, sequence parallelism; and a projection that ends in one."""

import torch
from torch import Tensor

from megarl.parallel import device

device.prepare()

from megatron.core.tensor_parallel.layers import RowParallelLinear  # noqa: E402  (the host is prepared first)
from megatron.core.transformer import TransformerConfig  # noqa: E402


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float32 (Zhang & Sennrich 2019).

    With `layernorm_zero_centered_gamma` it multiplies by 1 + weight, in float32 (Gemma); the weight is kept as checkpoints have it.
    Under sequence parallelism every tensor-parallel rank sees a part of the tokens; the weight is marked so that Megatron sums its
    gradient over those ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device.device()))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps
        self.is_zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in any float type -> the same shape and type."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.is_zero_centered:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class NormedRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel projection, then an RMSNorm: of what a block adds to the hidden states (Gemma 2 and 3)."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.output_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[S, B, input_size / tensor ranks] -> [S, B, output_size] and no bias; a rank's part of S under sequence parallelism."""
        output, bias = super().forward(input_)
        assert bias is None
        return self.output_norm(output), None
