"""One process group of all trainer ranks and all generators, beside the trainer's own: weights travel in it from node to node.

It is made of a key-value store and a backend object alone (gloo on CPU hosts, NCCL on GPU hosts), so that neither side needs the other in
its default group. Trainer ranks come first, generators after them: the numbering of the plan. Messages of a round are grouped.
"""

import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import RolloutError
from megarl.parallel import device


@dataclass(frozen=True)
class Meeting:
    """Where the members of a joint group find one another. `port` belongs to the first trainer rank's store on `host`."""

    host: str
    port: int
    num_trainers: int
    num_processes: int  # of all generators
    tensor: int  # of them a replica

    @property
    def size(self) -> int:
        return self.num_trainers + self.num_processes

    def name(self, rank: int) -> str:
        """A member in words."""
        return f"trainer rank {rank}" if rank < self.num_trainers else process_name(rank - self.num_trainers, self.tensor)


def process_name(number: int, tensor: int) -> str:
    """A generator's process in words, by its number among those of all replicas with `tensor` of them each."""
    return f"generator {number // tensor}" + (f" (its rank {number % tensor} of {tensor})" if tensor > 1 else "")


def reserve(host: str) -> tuple[socket.socket, int]:
    """A listening socket on `host` for the group's store, and its port. The first trainer rank calls it."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.bind(address)
    listening.listen(1024)
    return listening, listening.getsockname()[1]


class JointGroup:
    """This process's membership. Every member creates it at the same time; `listening` is what `reserve` returned, on rank 0 alone."""

    def __init__(self, meeting: Meeting, rank: int, timeout_s: float, listening: socket.socket | None = None):
        self.meeting, self.rank = meeting, rank
        patience = timedelta(seconds=timeout_s)
        try:
            self._store = dist.TCPStore(
                meeting.host,
                meeting.port,
                None,
                is_master=listening is not None,
                timeout=patience,
                wait_for_workers=False,
                master_listen_fd=None if listening is None else listening.detach(),
            )
            self._backend = self._start(dist.PrefixStore("megarl/joint", self._store), patience)
            # The first message of a NCCL communicator must not leave members out; and here everybody learns who is missing.
            everyone = torch.ones(1, device=device.device())
            self._backend.allreduce([everyone]).wait(patience)
        except RuntimeError as error:
            raise RolloutError(
                f"{meeting.name(rank)} cannot meet the other {meeting.size - 1} members of the joint group: {_first(error)}"
            ) from None

    def _start(self, store: dist.Store, patience: timedelta) -> dist.Backend:
        if not device.is_cuda():
            return dist.ProcessGroupGloo(store, self.rank, self.meeting.size, patience)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        return dist.ProcessGroupNCCL(store, self.rank, self.meeting.size, options)

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> list[tuple[int, dist.Work]]:
        """Start (member, contiguous tensor) transfers of one round, grouped; what to `wait` for."""
        if self._backend is None:
            raise RolloutError("the joint group of trainer and generators broke in an earlier weight sync")
        messages = [(rank, self._backend.send, tensor) for rank, tensor in sends]
        messages += [(rank, self._backend.recv, tensor) for rank, tensor in receives]
        with self._naming(None):
            if not device.is_cuda():
                return [(rank, start([tensor], rank, 0)) for rank, start, tensor in messages]
            self._backend._start_coalescing()
            for rank, start, tensor in messages:
                start([tensor], rank, 0)
            return [(messages[0][0], self._backend._end_coalescing())] if messages else []

    def wait(self, pending: Sequence[tuple[int, dist.Work]], deadline: float) -> None:
        """Returns when all of them are done. Raises `RolloutError` naming the member whose message failed."""
        for rank, work in pending:
            with self._naming(rank):
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        device.synchronize()

    @contextmanager
    def _naming(self, rank: int | None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            who = "a member of the joint group" if rank is None else self.meeting.name(rank)
            self.close()
            raise RolloutError(f"{who} is gone or does not answer in a weight sync ({_first(error)})") from None

    def close(self) -> None:
        """Leave at once: members that wait for this one learn of it. Harmless when called twice."""
        if self._backend is not None:
            self._backend.abort()
        self._backend = None


def _first(error: Exception) -> str:
    """The first sentence of a torch error, without the place in gloo's source."""
    return re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0]).partition(". ")[0][:160]
