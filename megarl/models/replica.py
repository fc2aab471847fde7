"""A model spread over the tensor-parallel ranks and pipeline stages of its replica, evaluated without gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarl.config import ParallelConfig
from megarl.data.pack_size import token_budget
from megarl.data.packing import Cost
from megarl.models.head_sharing import StageSharing
from megarl.models.spec import ModelSpec, quadratic_cost
from megarl.parallel import device, groups, pipeline
from megarl.parallel.collectives import max_over, sum_over
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.microbatches import Microbatches, Packing, cut


@dataclass
class Replica:
    """This rank's model chunks, and how batches pass through the replica they belong to.

    `microbatch_size` bounds the sequences of a forward pass, or with a `packing` their tokens are bounded.
    """

    chunks: list[torch.nn.Module]
    layout: ParallelLayout
    microbatch_size: int
    packing: Packing | None = None
    sharing: StageSharing | None = None  # how the stages share the head; None: it stays on the last stage

    def weights(self) -> list[Tensor]:
        """The parameters of this rank's chunks."""
        return [parameter.data for chunk in self.chunks for parameter in chunk.parameters()]

    def microbatches(self, batch: Any) -> Microbatches:
        """`batch` cut for this replica's pipeline, on its device. Every rank of the world calls it where replicas share experts.

        Interleaved chunks need a multiple of the stages. A layer of shared experts is computed by several replicas together, so they must
        have equally many microbatches.
        """
        multiple = self.layout.pipeline if len(self.chunks) > 1 else 1
        microbatches = cut(batch.to(device.device()), self.microbatch_size, multiple, self.packing)
        if self.layout.expert == 1:
            return microbatches
        count = max_over(torch.tensor(len(microbatches), device=device.device()), groups.group(self.layout, "dp"))
        return microbatches.filled(int(count))

    def forward(self, batch: Any, head: pipeline.Head) -> Tensor:
        """What `head` says about the sequences of `batch`, on every rank of the replica; every rank of it calls.

        `head` returns one tensor of f32[Q, ...] for Q sequences; the result's rows are in the order of `batch.sequences()`. No gradients.
        """
        for chunk in self.chunks:
            chunk.eval()
        microbatches = self.microbatches(batch)
        parts = pipeline.forward_only(self.chunks, microbatches, head, self.sharing)
        shape = head.result_shape(batch.sequences())
        if parts:
            result = microbatches.joined(parts, batch.sequences_per_row, len(batch))
            assert result.shape == shape and result.dtype == torch.float32
        else:
            result = torch.zeros(shape, dtype=torch.float32, device=device.device())
        return sum_over(result, groups.group(self.layout, "pp"))


def packing_of(spec: ModelSpec, parallel: ParallelConfig) -> Packing | None:
    """How sequences share a microbatch of this model; None: `max_tokens_per_microbatch` is 0, and they are padded."""
    if parallel.max_tokens_per_microbatch == 0:
        return None
    return Packing(token_budget(parallel), Cost(quadratic_cost(spec)))
