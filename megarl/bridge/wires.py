"""Wires between trainer ranks and generators that are processes of their own, and what such a process must know of the plan.

Two kinds of `transport.Wire`: rings of shared memory between processes of one host, and one joint process group over all hosts. Plan
ranks are the trainer's, then the generators', which are targets only. A generator's part of the plan reaches it as JSON, a `Delivery`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megarl.bridge.joint import JointGroup, Meeting
from megarl.bridge.plan import Op
from megarl.bridge.ring import RingReader, RingWriter
from megarl.bridge.transport import Pending, Wire


@dataclass(frozen=True)
class Delivery:
    """What one generator process receives in a sync, round by round, and over which wires.

    `rings` names the shared memory of each sending rank; without rings `meeting` says where the joint group meets.
    """

    rank: int  # in the plan
    rounds: tuple[tuple[Op, ...], ...]
    rings: dict[int, str]
    meeting: Meeting | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return {
            "rank": self.rank,
            "rounds": [[list(op) for op in ops] for ops in self.rounds],
            "rings": sorted(self.rings.items()),
            "meeting": None if self.meeting is None else vars(self.meeting),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Delivery":
        rounds = tuple(tuple(Op(name, tuple((a, n) for a, n in box), *numbers) for name, box, *numbers in ops) for ops in value["rounds"])
        meeting = None if value["meeting"] is None else Meeting(**value["meeting"])
        return cls(value["rank"], rounds, {rank: name for rank, name in value["rings"]}, meeting)

    @property
    def ops(self) -> tuple[Op, ...]:
        """Every slice that arrives here, in order."""
        return tuple(op for ops in self.rounds for op in ops)


class SyncWire(Wire, Protocol):
    """A wire that knows which sync it carries and until when."""

    def begin(self, sync: int, timeout_s: float) -> None:
        """The next messages belong to this sync; after `timeout_s` it has failed."""
        ...

    def drain(self) -> None:
        """Returns when everything sent has been taken."""
        ...

    def close(self) -> None:
        """Leave; whoever waits for this process learns of it."""
        ...


class RingWire:
    """Rings of this process, by the plan's rank of the other end. A process writes or reads, never both with one other."""

    def __init__(self, writers: dict[int, RingWriter] | None = None, readers: dict[int, RingReader] | None = None):
        self.writers, self.readers = writers or {}, readers or {}
        self._sync, self._deadline = 0, 0.0

    def begin(self, sync: int, timeout_s: float) -> None:
        self._sync, self._deadline = sync, time.monotonic() + timeout_s

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """Sends wait for free slots; every process takes what it is sent in the same order, so that nobody waits in a circle."""
        for rank, tensor in sends:
            self.writers[rank].send(self._sync, tensor, self._deadline)
        return _RingReceives(self, receives)

    def receive(self, messages: Sequence[tuple[int, Tensor]]) -> None:
        """Fill each tensor with its sender's next message."""
        for rank, tensor in messages:
            self.readers[rank].receive(self._sync, tensor, self._deadline)

    def drain(self) -> None:
        for writer in self.writers.values():
            writer.drained(self._deadline)

    def close(self) -> None:
        for ring in (*self.writers.values(), *self.readers.values()):
            ring.close()


class _RingReceives:
    def __init__(self, wire: RingWire, messages: Sequence[tuple[int, Tensor]]):
        self.wire, self.messages = wire, messages

    def wait(self) -> None:
        self.wire.receive(self.messages)


class JointWire:
    """The joint group of trainer ranks and generators."""

    def __init__(self, group: JointGroup):
        self.group = group
        self._deadline = 0.0

    def begin(self, sync: int, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        return _JointMessages(self.group, self.group.post(sends, receives), self._deadline)

    def drain(self) -> None:
        """A message that was waited for has been taken."""

    def close(self) -> None:
        self.group.close()


class _JointMessages:
    def __init__(self, group: JointGroup, works: Sequence, deadline: float):
        self.group, self.works, self.deadline = group, works, deadline

    def wait(self) -> None:
        self.group.wait(self.works, self.deadline)


def receiving_wire(delivery: Delivery, timeout_s: float) -> SyncWire:
    """A generator process's end. With a joint group, every member must come within `timeout_s`."""
    if delivery.meeting is not None:
        return JointWire(JointGroup(delivery.meeting, delivery.rank, timeout_s))
    return RingWire(readers={rank: RingReader(name, f"trainer rank {rank}") for rank, name in sorted(delivery.rings.items())})
