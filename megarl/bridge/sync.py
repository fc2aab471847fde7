"""Moves the actor's weights into the sampler after every update."""

import itertools
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.bridge.plan import Box, Op, Outline, TargetBox, WeightPlan, make_outline, within
from megarl.bridge.transport import BufferedTransport, GroupWire, Transport
from megarl.bridge.verify import Digests
from megarl.parallel import device, groups
from megarl.parallel.collectives import gather_distinct_json, gather_json, meet, sum_over
from megarl.parallel.layout import ParallelLayout

DEFAULT_BUCKET_BYTES = 256 << 20
_serials = itertools.count()  # of the syncs of a process: equal on all ranks


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
    def is_live(self, parameter: str) -> bool: ...
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
    num_rounds: int


@dataclass(frozen=True)
class RankDescription:
    """One rank of a plan, as JSON has it. Replicas of a shard hold, and replicas of a generator want, the same list."""

    held: list  # of (Hugging Face name, box)
    wanted: list  # of (Hugging Face name, box, parameter, its box)
    host: str


class WeightSync:
    """Pushes weights from the trainer's pieces into the sampler, by a plan made once.

    Every rank of the world creates it and calls `push`. Args: the first `verify_first` syncs and each `verify_every`-th (0: no others)
    compare digests of every slice at both ends, the rest trust the plan; `bucket_bytes` bounds the extra memory of a rank
    to twice that for sends and receives.
    """

    def __init__(
        self,
        engine: WeightReceiver,
        layout: ParallelLayout,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        verify_first: int = 2,
        verify_every: int = 0,
        timeout_s: float = 600.0,
    ):
        self.engine, self.layout, self.timeout_s = engine, layout, timeout_s
        self.bucket_bytes, self.verify_first, self.verify_every = bucket_bytes, verify_first, verify_every
        self.transport: Transport = BufferedTransport(layout.rank, engine.dtype, device.device(), GroupWire())
        self.num_syncs = 0
        self._plan: WeightPlan | None = None
        self._planned_pieces: list[tuple[str, Box]] = []
        self._group = groups.group(layout, "world")
        self._serial, self._num_pushes = next(_serials), 0

    def push(self, owner: WeightOwner, version: int) -> SyncReport:
        """Make the sampler draw from `owner`'s weights, called version `version`. Every rank calls it.

        Raises `WeightMapError` when trainer and sampler disagree about a tensor, `RolloutError` when a slice arrives altered or when
        a rank does not come; then the sampler has no version and generates nothing until a later push succeeds.
        """
        start = time.perf_counter()
        self._num_pushes += 1
        meet(f"weight sync {self._num_pushes}", self._group, self.timeout_s, key=f"sync/{self._serial}/{self._num_pushes}")
        pieces = list(owner.pieces)
        plan = self._plan_for(pieces)
        self.engine.begin_update()
        digests = self._digests(plan) if self._is_verified() else None
        self._run(plan, pieces, digests)
        if digests is not None:
            digests.compare(self._group)
        self.engine.end_update(version)
        self.num_syncs += 1
        device.synchronize()
        return self._report(plan, version, time.perf_counter() - start)

    def _is_verified(self) -> bool:
        is_due = self.verify_every > 0 and (self.num_syncs + 1) % self.verify_every == 0
        return is_due or self.num_syncs < self.verify_first

    def _plan_for(self, pieces: list[SourcePiece]) -> WeightPlan:
        held = [(piece.hf_name, piece.box) for piece in pieces]
        if self._plan is not None:
            assert held == self._planned_pieces, "the pieces changed after the plan was made"
            return self._plan
        # A first message between two ranks of a NCCL group must not be a point-to-point one that leaves other ranks out.
        sum_over(torch.zeros(1, device=device.device()), self._group)
        wanted = [(box.hf_name, box.hf_box, box.parameter, box.parameter_box) for box in self.engine.targets]
        everyone = self._everyone(RankDescription(held, wanted, socket.gethostname()))
        hosts = [rank.host for rank in everyone]
        outline = make_outline(
            _each_once([rank.held for rank in everyone], lambda name, box: (name, _box(box))),
            _each_once(
                [rank.wanted for rank in everyone],
                lambda name, box, parameter, inner: TargetBox(name, _box(box), parameter, _box(inner)),
            ),
            bucket_bytes=self.bucket_bytes,
            element_bytes=self.engine.dtype.itemsize,
            node_of=lambda rank: hosts.index(hosts[rank]),
        )
        self._plan, self._planned_pieces = self._write_out(outline), held
        return self._plan

    def _write_out(self, outline: Outline) -> WeightPlan:
        """This rank's part of the plan."""
        return outline.write_out(self.layout.rank)

    def _everyone(self, mine: "RankDescription") -> list["RankDescription"]:
        """What each rank of the plan holds and wants. Every rank calls it with its own."""
        held, wanted = gather_distinct_json(mine.held, self._group), gather_distinct_json(mine.wanted, self._group)
        hosts = gather_json(mine.host, self._group)
        return [RankDescription(*rank) for rank in zip(held, wanted, hosts, strict=True)]

    def _digests(self, plan: WeightPlan) -> Digests:
        return Digests(plan.ops, self.layout.rank, device.device())

    def _run(self, plan: WeightPlan, pieces: list[SourcePiece], digests: Digests | None) -> None:
        self.transport.run(plan.rounds, RankEnds(self.engine, self.layout.rank, plan.ops, pieces, digests))

    def _report(self, plan: WeightPlan, version: int, seconds: float) -> SyncReport:
        rank, size = self.layout.rank, self.engine.dtype.itemsize
        local = sum(op.num_elements for op in plan.ops if op.is_local and op.target_rank == rank)
        received = sum(op.num_elements for op in plan.ops if not op.is_local and op.target_rank == rank)
        sent = sum(op.num_elements for op in plan.ops if not op.is_local and op.source_rank == rank)
        return SyncReport(version, seconds, local * size, received * size, sent * size, len(plan.rounds))


class RankEnds:
    """One rank's side of one sync: `transport.Ends`."""

    def __init__(self, engine: WeightReceiver, rank: int, ops: Sequence[Op], pieces: Sequence[SourcePiece], digests: Digests | None):
        self.engine, self.pieces, self.digests = engine, pieces, digests
        self.targets = engine.targets
        self.missing = Counter(self._parameter(op) for op in ops if op.target_rank == rank)
        self.landed_ops: dict[str, list[Op]] = defaultdict(list)

    def _parameter(self, op: Op) -> str:
        return self.targets[op.target_index].parameter

    def read(self, op: Op) -> Tensor:
        piece = self.pieces[op.source_index]
        part = piece.view.detach()[within(op.box, piece.box)]
        if self.digests is not None:
            self.digests.sent(op, part, self.engine.dtype)
        return part

    def write(self, op: Op) -> Tensor:
        return slice_of_parameter(self.engine.target(self._parameter(op)), self.targets[op.target_index], op.box)

    def is_live(self, op: Op) -> bool:
        return self.engine.is_live(self._parameter(op))

    def landed(self, op: Op) -> None:
        parameter = self._parameter(op)
        self.landed_ops[parameter].append(op)
        self.missing[parameter] -= 1
        if self.missing[parameter] == 0:
            if self.digests is not None:  # at the last moment: a slice that later ones overwrote shows too
                for landed in self.landed_ops.pop(parameter):
                    self.digests.arrived(landed, self.write(landed))
            self.engine.finish_parameters([parameter])


def slice_of_parameter(parameter: Tensor, wanted: TargetBox, box: Box) -> Tensor:
    """The view of `parameter` that holds `box` of the Hugging Face tensor `wanted` speaks about; a part of `wanted.hf_box`."""
    # A parameter may stack several tensors (experts) along leading axes of size 1 inside the box.
    leading = len(wanted.parameter_box) - len(wanted.hf_box)
    view = parameter[tuple(slice(offset, offset + size) for offset, size in wanted.parameter_box)]
    for _ in range(leading):
        view = view[0]
    return view[within(box, wanted.hf_box)]


def _each_once(lists: list[list], item: Callable) -> list[list]:
    """`item(*entry)` of the entries of every list; a list that stands there several times is made once and shared."""
    made = {id(entries): [item(*entry) for entry in entries] for entries in {id(entries): entries for entries in lists}.values()}
    return [made[id(entries)] for entries in lists]


def _box(pairs: list) -> Box:
    return tuple((offset, size) for offset, size in pairs)
