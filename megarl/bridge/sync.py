"""Moves the actor's weights into the sampler after every update."""

import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.bridge.plan import Box, Op, TargetBox, WeightPlan, make_plan, within
from megarl.bridge.transport import SameProcessTransport, Transport
from megarl.bridge.verify import Digests
from megarl.parallel import device, groups
from megarl.parallel.collectives import gather_json, sum_over
from megarl.parallel.layout import ParallelLayout

DEFAULT_BUCKET_BYTES = 256 << 20


class SourcePiece(Protocol):
    """A live view of the trainer's weights: `models.pieces.Piece`."""

    hf_name: str
    box: Box
    view: Tensor


class WeightOwner(Protocol):
    """A role whose weights can be pushed: the actor."""

    pieces: Sequence[SourcePiece]


class WeightReceiver(Protocol):
    """The sampler's side of a sync."""

    targets: Sequence[TargetBox]
    dtype: torch.dtype

    def begin_update(self) -> None: ...
    def target(self, parameter: str) -> Tensor: ...
    def finish_parameters(self, parameters: Sequence[str]) -> None: ...
    def end_update(self, version: int) -> None: ...


@dataclass(frozen=True)
class SyncReport:
    """What one push moved on this rank. `received_bytes` + `local_bytes` is the size of the rank's target: nothing arrives twice."""

    version: int
    seconds: float
    local_bytes: int
    received_bytes: int
    sent_bytes: int
    num_buckets: int


class WeightSync:
    """Pushes weights from the trainer's pieces into the sampler, by a plan made once.

    Every rank of the world creates it and calls `push`. Args: `verify_first` syncs compare digests of every slice at both ends
    (several times slower than the sync itself on a CPU), later ones trust the plan; `bucket_bytes` bounds the extra memory of a rank
    to twice that for sends and receives.
    """

    def __init__(self, engine: WeightReceiver, layout: ParallelLayout, *, bucket_bytes: int = DEFAULT_BUCKET_BYTES, verify_first: int = 2):
        self.engine, self.layout = engine, layout
        self.bucket_bytes, self.verify_first = bucket_bytes, verify_first
        self.transport: Transport = SameProcessTransport(layout.rank, engine.dtype, device.device())
        self.num_syncs = 0
        self._plan: WeightPlan | None = None
        self._planned_pieces: list[tuple[str, Box]] = []
        self._group = groups.group(layout, "world")

    def push(self, owner: WeightOwner, version: int) -> SyncReport:
        """Make the sampler draw from `owner`'s weights, called version `version`. Every rank calls it.

        Raises `WeightMapError` when trainer and sampler disagree about a tensor, `RolloutError` when a slice arrives altered.
        """
        start = time.perf_counter()
        pieces = list(owner.pieces)
        plan = self._plan_for(pieces)
        self.engine.begin_update()
        digests = Digests(plan.ops, device.device()) if self.num_syncs < self.verify_first else None
        self._run(plan, pieces, digests)
        if digests is not None:
            digests.compare(self._group)
        self.engine.end_update(version)
        self.num_syncs += 1
        device.synchronize()
        return self._report(plan, version, time.perf_counter() - start)

    def _plan_for(self, pieces: list[SourcePiece]) -> WeightPlan:
        held = [(piece.hf_name, piece.box) for piece in pieces]
        if self._plan is not None:
            assert held == self._planned_pieces, "the pieces changed after the plan was made"
            return self._plan
        # A first message between two ranks of a NCCL group must not be a point-to-point one that leaves other ranks out.
        sum_over(torch.zeros(1, device=device.device()), self._group)
        wanted = [(box.hf_name, box.hf_box, box.parameter, box.parameter_box) for box in self.engine.targets]
        everyone = gather_json({"held": held, "wanted": wanted, "host": socket.gethostname()}, self._group)
        hosts = [rank["host"] for rank in everyone]
        self._plan = make_plan(
            [[(name, _box(box)) for name, box in rank["held"]] for rank in everyone],
            [[TargetBox(name, _box(box), parameter, _box(inner)) for name, box, parameter, inner in rank["wanted"]] for rank in everyone],
            bucket_bytes=self.bucket_bytes,
            element_bytes=self.engine.dtype.itemsize,
            node_of=lambda rank: hosts.index(hosts[rank]),
        )
        self._planned_pieces = held
        return self._plan

    def _run(self, plan: WeightPlan, pieces: list[SourcePiece], digests: Digests | None) -> None:
        rank, targets = self.layout.rank, self.engine.targets

        def read(op: Op) -> Tensor:
            piece = pieces[op.source_index]
            return piece.view.detach()[within(op.box, piece.box)]

        def write(op: Op) -> Tensor:
            wanted = targets[op.target_index]
            return slice_of_parameter(self.engine.target(wanted.parameter), wanted, op.box)

        waiting = Counter(targets[op.target_index].parameter for op in plan.ops if op.target_rank == rank)
        for bucket in plan.buckets:
            self.transport.run(bucket, read, write)
            arrived = [op for op in bucket if op.target_rank == rank]
            if digests is not None:
                for op in bucket:
                    if op.source_rank == rank:
                        digests.sent(op, read(op).to(self.engine.dtype))
                for op in arrived:
                    digests.arrived(op, write(op))
            landed = Counter(targets[op.target_index].parameter for op in arrived)
            waiting -= landed
            self.engine.finish_parameters([parameter for parameter in landed if parameter not in waiting])

    def _report(self, plan: WeightPlan, version: int, seconds: float) -> SyncReport:
        rank, size = self.layout.rank, self.engine.dtype.itemsize
        local = sum(op.num_elements for op in plan.ops if op.is_local and op.target_rank == rank)
        received = sum(op.num_elements for op in plan.ops if not op.is_local and op.target_rank == rank)
        sent = sum(op.num_elements for op in plan.ops if not op.is_local and op.source_rank == rank)
        return SyncReport(version, seconds, local * size, received * size, sent * size, len(plan.buckets))


def slice_of_parameter(parameter: Tensor, wanted: TargetBox, box: Box) -> Tensor:
    """The view of `parameter` that holds `box` of the Hugging Face tensor `wanted` speaks about; a part of `wanted.hf_box`."""
    # A parameter may stack several tensors (experts) along leading axes of size 1 inside the box.
    leading = len(wanted.parameter_box) - len(wanted.hf_box)
    view = parameter[tuple(slice(offset, offset + size) for offset, size in wanted.parameter_box)]
    for _ in range(leading):
        view = view[0]
    return view[within(box, wanted.hf_box)]


def _box(pairs: list) -> Box:
    return tuple((offset, size) for offset, size in pairs)
