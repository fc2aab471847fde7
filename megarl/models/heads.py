"""The scalar head of critic and reward model: one number a token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.parallel import device

device.prepare()

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402  (the host is prepared first)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


class ScalarHead(torch.nn.Module):
    """A linear map without bias from the hidden width to one number, the same on every tensor-parallel rank.

    It stands where an actor's vocabulary head stands, as `output_layer` of the last stage; weight [1, H] in the parameters' type, the
    product in float32. Under sequence parallelism each rank maps its part of the tokens, and Megatron sums the weight's gradient.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device.device()))
        self.weight.sequence_parallel = config.sequence_parallel
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [S, B, H], a rank's part of S under sequence parallelism -> f32[S, B], all of S on every tensor-parallel rank."""
        outputs = F.linear(hidden.float(), self.weight.float()).squeeze(-1)
        if self.sequence_parallel:
            # every rank computes the same loss from the gathered outputs, so each takes its own part of the gradient, unsummed
            outputs = gather_from_sequence_parallel_region(outputs, tensor_parallel_output_grad=False)
        return outputs

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's description of the weight: whole on every rank, owned by the first tensor- and data-parallel rank."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, sharded_offsets=sharded_offsets)
