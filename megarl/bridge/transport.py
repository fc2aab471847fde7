"""Runs one bucket of a plan: local copies, and one message for each pair of ranks that exchange anything in it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.bridge.plan import Op

Slice = Callable[[Op], Tensor]


class Transport(Protocol):
    """One bucket at a time; every rank of the world calls `run` with the same bucket."""

    def run(self, bucket: Sequence[Op], read: Slice, write: Slice) -> None:
        """`read(op)` is the slice of a source piece this rank holds, `write(op)` the slice of a target that it must fill."""
        ...


class SameProcessTransport:
    """Trainer and sampler share each process: local slices are copied, others travel point to point in the default group.

    Args: `dtype` is the sampler's; the sender casts, which halves the bytes of float32 masters.
    """

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device):
        self.rank, self.dtype, self.device = rank, dtype, device

    @torch.no_grad()
    def run(self, bucket: Sequence[Op], read: Slice, write: Slice) -> None:
        sends, receives = defaultdict(list), defaultdict(list)
        for op in bucket:
            if op.source_rank == self.rank != op.target_rank:
                sends[op.target_rank].append(op)
            elif op.target_rank == self.rank != op.source_rank:
                receives[op.source_rank].append(op)
        outgoing = {rank: torch.cat([read(op).reshape(-1).to(self.dtype) for op in ops]) for rank, ops in sorted(sends.items())}
        incoming = {
            rank: torch.empty(sum(op.num_elements for op in ops), dtype=self.dtype, device=self.device)
            for rank, ops in sorted(receives.items())
        }
        exchange = [dist.P2POp(dist.isend, tensor, rank) for rank, tensor in outgoing.items()]
        exchange += [dist.P2POp(dist.irecv, tensor, rank) for rank, tensor in incoming.items()]
        pending = dist.batch_isend_irecv(exchange) if exchange else []
        for op in bucket:
            if op.source_rank == self.rank == op.target_rank:
                write(op).copy_(read(op).to(self.dtype))
        for request in pending:
            request.wait()
        for rank, ops in receives.items():
            for op, part in zip(ops, _parts(incoming[rank], ops)):
                target = write(op)
                target.copy_(part.view(target.shape))


def _parts(tensor: Tensor, ops: Sequence[Op]) -> Iterator[Tensor]:
    return iter(tensor.split([op.num_elements for op in ops]))
