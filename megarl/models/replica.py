"""A model spread over the tensor-parallel ranks and pipeline stages of its replica, evaluated without gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarl.parallel import device, groups, pipeline
from megarl.parallel.collectives import broadcast
from megarl.parallel.layout import ParallelLayout


@dataclass
class Replica:
    """This rank's model chunks, and how batches pass through the replica they belong to.

    `microbatch_size` bounds the sequences of a forward pass.
    """

    chunks: list[torch.nn.Module]
    layout: ParallelLayout
    microbatch_size: int

    @property
    def last_stage_rank(self) -> int:
        """The rank that stands where this one does, on the last pipeline stage."""
        return self.layout.ranks_along("pp")[-1]

    def forward(self, batch: Any, head: pipeline.Head) -> Tensor:
        """What `head` says about the sequences of `batch`, on every rank of the replica; every rank of it calls.

        `head` returns one tensor of f32[Q, ...] for Q sequences; the result's rows are in the order of `batch.sequences()`. No gradients.
        """
        for chunk in self.chunks:
            chunk.eval()
        parts = pipeline.forward_only(self.chunks, pipeline.cut(batch.to(device.device()), self.microbatch_size), head)
        sequences = batch.sequences()
        if not self.layout.is_last_stage:
            result = torch.empty(head.result_shape(sequences), dtype=torch.float32, device=device.device())
        else:
            result = _joined(parts, batch.sequences_per_row, len(batch))
            assert result.shape == head.result_shape(sequences) and result.dtype == torch.float32
        return broadcast(result, self.last_stage_rank, groups.group(self.layout, "pp"))


def _joined(parts: Sequence[Tensor], sequences_per_row: int, num_rows: int) -> Tensor:
    """Microbatch results [M Q, ...] as one [B Q, ...] without the dummies, sequence axis outside rows."""
    by_row = torch.cat([part.view(sequences_per_row, -1, *part.shape[1:]) for part in parts], dim=1)
    return by_row[:, :num_rows].flatten(0, 1).contiguous()
