"""Two slots of memory that one process writes and another reads: how a trainer rank hands weights to a generator on its node.

The slots lie in POSIX shared memory on a CPU host, and in the writer's GPU memory, opened by the reader through CUDA IPC, on a GPU host;
counters and labels always lie in shared memory. A message larger than a slot passes in parts, and the writer is at most two parts ahead,
so a pair of processes never holds more than two slots, whatever the size of the model. Nothing is pickled: a part is a label (sync,
bytes) and raw elements.
"""

import json
import mmap
import os
import select
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import RolloutError
from megarl.parallel import device

SHARED_MEMORY = Path("/dev/shm")
NUM_SLOTS = 2
HEADER_BYTES = 4096
HANDLE_START = 1024  # of the CUDA IPC handle, JSON, in the header
LOOK_EVERY_S = 0.02  # at the other end's health while waiting
LONGEST_NAP_S = 0.001

# Numbers of the header, u64 each. One process writes each of them.
_WRITTEN, _READ, _SLOT_BYTES, _WRITER, _READER, _IS_CUDA, _WRITER_LEFT, _READER_LEFT = range(8)
_LABELS = 8  # of slot i: _LABELS + 2 * i: sync, bytes


class _Ring:
    """What both ends share: the mapped header and the watch on the other process."""

    _own_flag, _other_flag = _WRITER_LEFT, _READER_LEFT

    def __init__(self, path: Path, mapped: mmap.mmap, other: str):
        self.path, self.other = path, other
        self._mapped = mapped
        self._numbers = memoryview(mapped)[:HANDLE_START].cast("Q")
        self._slots: Tensor = torch.empty(0, dtype=torch.uint8)
        self._other_process: int | None = None
        self._count = 0  # parts this end has dealt with

    def _parts(self, tensor: Tensor) -> Iterator[Tensor]:
        """The bytes of a contiguous tensor in parts that fit a slot."""
        return iter(tensor.view(-1).view(torch.uint8).split(self._numbers[_SLOT_BYTES]))

    def _slot(self, num_bytes: int) -> Tensor:
        start = self._count % NUM_SLOTS * self._numbers[_SLOT_BYTES]
        return self._slots[start : start + num_bytes]

    @property
    def _label(self) -> slice:
        start = _LABELS + 2 * (self._count % NUM_SLOTS)
        return slice(start, start + 2)

    def _watch(self, pid: int) -> None:
        try:
            self._other_process = os.pidfd_open(pid)
        except OSError as error:
            raise RolloutError(f"{self.other} (pid {pid}) ended before its first message ({error.strerror})") from None

    def _wait(self, is_ready, deadline: float, what: str) -> None:
        """Returns when `is_ready()`; raises `RolloutError` when the other process ends or the deadline passes."""
        nap, next_look = 0.0, time.monotonic() + LOOK_EVERY_S
        while not is_ready():
            time.sleep(nap)
            nap = min(nap + 2e-5, LONGEST_NAP_S)
            if self._numbers[self._other_flag] and not is_ready():
                raise RolloutError(f"{self.other} gave up in the middle of a weight sync")
            now = time.monotonic()
            if now < next_look:
                continue
            next_look = now + LOOK_EVERY_S
            if self._other_process is not None and select.select([self._other_process], [], [], 0)[0] and not is_ready():
                raise RolloutError(f"{self.other} ended in the middle of a weight sync")
            if now > deadline:
                raise RolloutError(f"{self.other} did not {what} in time: a weight sync hangs")

    def close(self) -> None:
        """Leave: the other end learns of it if it waits. Gives the memory back; harmless when called twice."""
        self._numbers[self._own_flag] = 1
        self._slots = torch.empty(0, dtype=torch.uint8)
        if self._other_process is not None:
            os.close(self._other_process)
            self._other_process = None


class RingWriter(_Ring):
    """The trainer's end; creates the ring. Args: `reader` names the other end in messages."""

    def __init__(self, name: str, slot_bytes: int, reader: str):
        path = SHARED_MEMORY / name
        in_memory = HEADER_BYTES + (0 if device.is_cuda() else NUM_SLOTS * slot_bytes)
        super().__init__(path, _create(path, in_memory), reader)
        self._numbers[_SLOT_BYTES], self._numbers[_WRITER] = slot_bytes, os.getpid()
        if device.is_cuda():
            self._slots = torch.empty(NUM_SLOTS * slot_bytes, dtype=torch.uint8, device=device.device())
            handle = json.dumps([part.hex() if isinstance(part, bytes) else part for part in self._slots.untyped_storage()._share_cuda_()])
            assert len(handle) < HEADER_BYTES - HANDLE_START, "the CUDA IPC handle grew"
            self._mapped[HANDLE_START : HANDLE_START + len(handle)] = handle.encode()
            self._numbers[_IS_CUDA] = 1
        else:
            self._slots = torch.frombuffer(self._mapped, dtype=torch.uint8, offset=HEADER_BYTES)

    def meet_reader(self) -> None:
        """Watch over the process that has opened the ring. Raises `RolloutError` when it is gone already."""
        assert self._numbers[_READER], "the reader has not opened the ring"
        self._watch(self._numbers[_READER])

    def unlink(self) -> None:
        """Forget the name: the memory now lasts exactly as long as the processes that have opened it."""
        self.path.unlink(missing_ok=True)

    def send(self, sync: int, tensor: Tensor, deadline: float) -> None:
        """Write a contiguous tensor, part by part as slots become free. On return it may change."""
        for part in self._parts(tensor):
            self._wait(lambda: self._count - self._numbers[_READ] < NUM_SLOTS, deadline, "take its weights")
            self._slot(part.numel()).copy_(part)
            device.synchronize()
            self._numbers[self._label] = memoryview(array("Q", (sync, part.numel())))
            self._count += 1
            self._numbers[_WRITTEN] = self._count

    def drained(self, deadline: float) -> None:
        """Returns when the reader has taken everything."""
        self._wait(lambda: self._numbers[_READ] == self._count, deadline, "take its weights")


class RingReader(_Ring):
    """The generator's end of the ring called `name`; `writer` names the other end in messages."""

    _own_flag, _other_flag = _READER_LEFT, _WRITER_LEFT

    def __init__(self, name: str, writer: str):
        path = SHARED_MEMORY / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise RolloutError(f"the shared memory {path} of {writer} cannot be opened ({error.strerror})") from None
        try:
            super().__init__(path, mmap.mmap(descriptor, os.fstat(descriptor).st_size), writer)
        finally:
            os.close(descriptor)
        if self._numbers[_IS_CUDA]:
            end = self._mapped.find(b"\0", HANDLE_START)
            handle = json.loads(self._mapped[HANDLE_START:end])
            torch.cuda.current_stream()  # starts CUDA in this process
            storage = torch.UntypedStorage._new_shared_cuda(*(bytes.fromhex(part) if isinstance(part, str) else part for part in handle))
            self._slots = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        else:
            self._slots = torch.frombuffer(self._mapped, dtype=torch.uint8, offset=HEADER_BYTES)
        self._numbers[_READER] = os.getpid()
        self._watch(self._numbers[_WRITER])

    def receive(self, sync: int, tensor: Tensor, deadline: float) -> None:
        """Fill a contiguous tensor with the next message, which must be of this sync and size."""
        for part in self._parts(tensor):
            self._wait(lambda: self._numbers[_WRITTEN] > self._count, deadline, "send its weights")
            found = tuple(self._numbers[self._label])
            if found != (sync, part.numel()):
                raise RolloutError(
                    f"{self.other} sent {found[1]} bytes of weight sync {found[0]}; expected {part.numel()} bytes of sync {sync}:"
                    " a rank skipped a sync"
                )
            part.copy_(self._slot(part.numel()))
            device.synchronize()
            self._count += 1
            self._numbers[_READ] = self._count


def _create(path: Path, size: int) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # an error here instead of a signal at the first write to a full device
            return mmap.mmap(descriptor, size)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RolloutError(
            f"{size} bytes of shared memory at {path} cannot be had ({error.strerror}); make {SHARED_MEMORY} larger"
        ) from None
