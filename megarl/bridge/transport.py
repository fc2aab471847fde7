"""Runs a plan: local copies, and messages between ranks, round after round with two rounds of buffers.

While one round is on the wire, the next one is packed and posted and local slices are copied. The extra memory of a rank is two
rounds of sends and two of receives, at most 4B, plus what the receiving side stages of one module.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.bridge.plan import Op

OWN_MESSAGE_BYTES = 1 << 20
"""A slice of this size or more is a message of its own, which both ends may leave unpacked; smaller ones share one."""


class Ends(Protocol):
    """Where the slices of this rank's ops lie, and who hears that they arrived."""

    def read(self, op: Op) -> Tensor:
        """The slice of this rank's source piece, a view in the trainer's type. Called once for each op that starts here."""
        ...

    def write(self, op: Op) -> Tensor:
        """The slice of this rank's target that the op fills, a view in the sampler's type. It may start to exist with this call."""
        ...

    def is_live(self, op: Op) -> bool:
        """True when the target is a parameter in place: data may be received into it, and local slices copied, in any order."""
        ...

    def landed(self, op: Op) -> None:
        """The op's slice is complete in its target. Called once for each op that ends here, in the plan's order where not live."""
        ...


class Transport(Protocol):
    """Moves the slices of a plan. Every rank that the plan names calls `run` with its own ops of the same plan."""

    def run(self, rounds: Sequence[Sequence[Op]], ends: Ends) -> None: ...


class Pending(Protocol):
    """Transfers under way."""

    def wait(self) -> None:
        """Returns when the sent tensors may change and the received ones may be read (on a GPU: by work queued after this call)."""
        ...


class Wire(Protocol):
    """Carries the messages of one rank. Between two ranks they arrive in the order in which they were posted."""

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """Start (peer, contiguous tensor) transfers and return at once. Both ends post equal sizes for a round, an empty one not at all."""
        ...


class GroupWire:
    """Point-to-point messages in a process group (gloo or NCCL) whose rank numbers are the plan's."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        exchange = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends]
        exchange += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in receives]
        return _All(dist.batch_isend_irecv(exchange))


class _All:
    def __init__(self, works: Sequence[dist.Work]):
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class BufferedTransport:
    """Runs rounds over a wire. `rank` is this process in the plan, `dtype` the sampler's: senders cast, which halves float32 masters."""

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device, wire: Wire):
        self.rank, self.dtype, self.device, self.wire = rank, dtype, device, wire

    @torch.no_grad()
    def run(self, rounds: Sequence[Sequence[Op]], ends: Ends) -> None:
        """Called by every rank of the plan. Raises what the wire raises when a peer is gone."""
        if not rounds:
            return
        frames = [_Frame.of(ops, self.rank, self.dtype.itemsize) for ops in rounds]
        buffers = [_Buffers(frames[half::2], self.dtype, self.device) for half in (0, 1)]
        posted = self._post(frames[0], buffers[0], ends)
        for number, ops in enumerate(rounds):
            current, arrived = posted
            if number + 1 < len(rounds):
                posted = self._post(frames[number + 1], buffers[(number + 1) % 2], ends)
            waiting = self._copy_local(ops, ends)
            if current is not None:
                current.wait()
            for op in waiting:
                if op.is_local:
                    self._copy(ends.read(op), op, ends)
                else:
                    self._copy(arrived.pop(op), op, ends)

    def _post(self, frame: "_Frame", buffers: "_Buffers", ends: Ends) -> tuple[Pending | None, dict[Op, Tensor | None]]:
        """Pack and start a round. Returns the transfers, and where each arriving slice lies (None: in its target already)."""
        sends, receives, arrived = [], [], {}
        used = 0
        for peer, ops in frame.sends:
            if len(ops) == 1 and _is_sendable(view := ends.read(ops[0]), self.dtype, self.device):
                sends.append((peer, view.view(-1)))
                continue
            start = used
            for op in ops:
                part = buffers.sends[used : used + op.num_elements]
                source = view if len(ops) == 1 else ends.read(op)
                part.view(source.shape).copy_(source)
                used += op.num_elements
            sends.append((peer, buffers.sends[start:used]))
        used = 0
        for peer, ops in frame.receives:
            if len(ops) == 1 and frame.is_own(ops[0]) and ends.is_live(ops[0]) and (view := ends.write(ops[0])).is_contiguous():
                receives.append((peer, view.view(-1)))
                arrived[ops[0]] = None
                continue
            start = used
            for op in ops:
                arrived[op] = buffers.receives[used : used + op.num_elements]
                used += op.num_elements
            receives.append((peer, buffers.receives[start:used]))
        return (self.wire.post(sends, receives) if sends or receives else None), arrived

    def _copy_local(self, ops: Sequence[Op], ends: Ends) -> list[Op]:
        """Copy the local slices that need not wait; returns the ops that end here and are still to do, in order.

        Staged targets are filled in the plan's order, so that no more than one module is staged at a time.
        """
        left = []
        for op in ops:
            if op.target_rank != self.rank:
                continue
            if op.is_local and (not left or ends.is_live(op)):
                self._copy(ends.read(op), op, ends)
            else:
                left.append(op)
        return left

    def _copy(self, source: Tensor | None, op: Op, ends: Ends) -> None:
        if source is not None:
            target = ends.write(op)
            target.copy_(source.view(target.shape) if source.dim() != target.dim() else source)
        ends.landed(op)


class _Frame:
    """The messages of one round that this rank sends and receives, in an order on which both ends agree."""

    def __init__(self, sends: list[tuple[int, list[Op]]], receives: list[tuple[int, list[Op]]], own_elements: int):
        self.sends, self.receives, self.own_elements = sends, receives, own_elements

    @classmethod
    def of(cls, ops: Sequence[Op], rank: int, element_bytes: int) -> "_Frame":
        sends, receives = defaultdict(list), defaultdict(list)
        for op in ops:
            if op.source_rank == rank != op.target_rank:
                sends[op.target_rank].append(op)
            elif op.target_rank == rank != op.source_rank:
                receives[op.source_rank].append(op)
        own = max(1, OWN_MESSAGE_BYTES // element_bytes)
        return cls(
            [(peer, part) for peer, part in sorted(sends.items()) for part in _messages(part, own)],
            [(peer, part) for peer, part in sorted(receives.items()) for part in _messages(part, own)],
            own,
        )

    def is_own(self, op: Op) -> bool:
        return op.num_elements >= self.own_elements


def _messages(ops: Sequence[Op], own_elements: int) -> list[list[Op]]:
    """The slices between two ranks in one round: large ones alone, the small ones together."""
    large = [[op] for op in ops if op.num_elements >= own_elements]
    small = [op for op in ops if op.num_elements < own_elements]
    return large + [small] if small else large


class _Buffers:
    """One flat buffer for sends and one for receives, as large as the largest of every other round needs."""

    def __init__(self, frames: Sequence[_Frame], dtype: torch.dtype, device: torch.device):
        self.sends = torch.empty(max((_size(frame.sends) for frame in frames), default=0), dtype=dtype, device=device)
        self.receives = torch.empty(max((_size(frame.receives) for frame in frames), default=0), dtype=dtype, device=device)


def _size(messages: Sequence[tuple[int, list[Op]]]) -> int:
    return sum(op.num_elements for _, ops in messages for op in ops)


def _is_sendable(view: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return view.dtype == dtype and view.device.type == device.type and view.is_contiguous()
