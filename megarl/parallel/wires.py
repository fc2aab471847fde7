"""Messages between the pipeline stages of a replica: sends that do not block, receives that are posted ahead.

A *wire* is one kind of message in one direction. Wires never wait for each other: with gloo each has its tag, with NCCL, which knows no
tags and serialises what a pair of ranks says in one group, each has its process group (`groups.wires`).
"""

from collections.abc import Iterable, Iterator
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
