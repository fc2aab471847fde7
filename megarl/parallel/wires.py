"""Messages between the pipeline stages of a replica: sends that do not block, receives that are posted ahead.

A *wire* is one kind of message in one direction. Wires never wait for each other: with gloo each has its tag, with NCCL, which knows no
tags and serialises what a pair of ranks says in one group, each has its process group (`groups.wires`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel import device

Kind = Literal["activations", "gradients", "dealt", "returned"]
KINDS: tuple[Kind, ...] = ("activations", "gradients", "dealt", "returned")


@dataclass(frozen=True)
class Wire:
    """One kind of message between the ranks of `group`."""

    group: dist.ProcessGroup
    tag: int


def connect(wires: Mapping[Kind, Wire], ranks: Sequence[int], stage: int) -> None:
    """A first message over every wire, pair by pair in one order. Called by every stage of a replica, whose `ranks` they are.

    NCCL makes a connection with the first message between two ranks, for which both wait; in the order of a schedule stages would wait
    for each other in a circle.
    """
    last = len(ranks) - 1
    for kind in KINDS:
        others = range(last)
        pairs = {
            "activations": [(other, other + 1) for other in others],
            "gradients": [(other + 1, other) for other in others],
            "dealt": [(last, other) for other in others],
            "returned": [(other, last) for other in others],
        }[kind]
        for source, destination in pairs:
            message = torch.zeros(1, device=device.device())
            if stage == source:
                dist.isend(message, dst=ranks[destination], group=wires[kind].group, tag=wires[kind].tag).wait()
            elif stage == destination:
                dist.irecv(message, src=ranks[source], group=wires[kind].group, tag=wires[kind].tag).wait()


class Outbox:
    """Messages under way. A tensor that was sent stays alive, and must stay unchanged, until it has left."""

    def __init__(self) -> None:
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, wire: Wire, destination: int) -> None:
        """Returns at once. Empty tensors are not sent."""
        self._under_way = [(work, held) for work, held in self._under_way if not work.is_completed()]
        if tensor.numel():
            tensor = tensor.contiguous()
            self._under_way.append((dist.isend(tensor, dst=destination, group=wire.group, tag=wire.tag), tensor))

    def wait(self) -> None:
        """Returns when everything has left."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way = []


class Inbox:
    """Messages of one wire from one rank, in order, of known shapes; the next one may arrive while this rank computes."""

    def __init__(self, wire: Wire, source: int, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype):
        self._wire, self._source, self._dtype = wire, source, dtype
        self._shapes: Iterator[tuple[int, ...]] = iter(shapes)
        self._post()

    def take(self) -> Tensor:
        """Waits for the next message and returns it."""
        tensor, work = self._posted
        if work is not None:
            work.wait()
        self._post()
        return tensor

    def _post(self) -> None:
        shape = next(self._shapes, None)
        if shape is None:
            self._posted = None
            return
        tensor, work = torch.empty(shape, dtype=self._dtype, device=device.device()), None
        if tensor.numel():
            work = dist.irecv(tensor, src=self._source, group=self._wire.group, tag=self._wire.tag)
        self._posted = (tensor, work)
